"""What a batch held, written down when its loss is not finite."""

from experiments import distributed, files


def not_finite(workdir, dataset, step, values):
    """Writes the rows of the batch of this step, their documents and token ids, to not_finite.STEP.json in
    `workdir`; returns what to say. `values` has "loss" and "grad_norm".
    """
    path = workdir / f"not_finite.{step}.json"
    batch, names = next(iter(dataset.train_batches(step - 1))), dataset.names
    rows = []
    for row, tokens in enumerate(batch["tokens"]):
        held = dict.fromkeys(batch["documents"][row][batch["mask"][row] != 0].tolist())
        rows.append({"row": row, "documents": [names[number] for number in held], "tokens": tokens.tolist()})
    if distributed.first():
        about = {"step": step, "batch": step - 1, "loss": str(values["loss"]), "grad_norm": str(values["grad_norm"])}
        files.write_json(path, {**about, "rows": rows})
    return (
        f"loss {values['loss']}, gradient norm {values['grad_norm']} at step {step} (batch {step - 1}, listed in "
        f"{path}): the update was not made and nothing saved; the last checkpoint is from before"
    )
