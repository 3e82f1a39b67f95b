"""Several GPUs of one host against one.

train        weak scaling of mamba2_1b and transformer_1b: the same rows a device, over data or fsdp; and the losses
             of one device's batch spread over all of them, beside those of the one device
attention    causal attention of one long sequence with time cut over 2, 4, ... devices: ring, zigzag, heads; `share`
             is the rate of useful FLOPs of a device over that of one device with all of the keys
recurrences  the same number of tokens a device, time cut: linear attention, the delta rule, the linear scan
equal        short calls of these with time cut over all devices, beside float64 on one

Bytes that a device sends are read from the compiled program, beside those of the formula where there is one. With
--jobs cases compile side by side, and of those that are ready the first in the list has the devices next: those of most
use come first, for a machine whose time may end before the last.
"""

from experiments.bench import scaling_ops, scaling_train

NAME = "scaling"
COLUMNS = (
    ("part", "part", ""),
    ("what", "what", ""),
    ("how", "over", ""),
    ("devices", "devices", ","),
    ("tokens", "tokens", ","),
    ("fwd_ms", "forward, ms", ".2f"),
    ("fwd_bwd_ms", "with gradients, ms", ".2f"),
    ("step_ms", "step, ms", ".1f"),
    ("tokens_per_second", "tokens/s", ",.0f"),
    ("tflops", "TFLOP/s a device, forward", ".0f"),
    ("share", "share of one device's rate, forward", ".1%"),
    ("share_both", "with gradients", ".1%"),
    ("sent", "bytes sent by a device, forward", ","),
    ("sent_formula", "by the formula", ","),
    ("error", "error, output", ".1e"),
    ("gradient_error", "worst of the gradients", ".1e"),
    ("loss_error", "relative error of the losses", ".1e"),
    ("settings", "settings", ""),
)


def cases(args):
    """All cases that this machine's devices allow, those of most use first."""
    first, rest = scaling_ops.cases(args)
    return [*first, *scaling_train.cases(args), *rest]


def relate(rows):
    """Puts the shares of one device's rate into the rows of several."""
    scaling_train.relate([row for row in rows if row["part"] == "train"])
    for part in ("attention", "recurrences"):
        scaling_ops.relate([row for row in rows if row["part"] == part])


def draw(rows, figure):
    """Share of one device's rate by devices, and of attention by length."""
    figure.set_size_inches(9, 3.4)
    left, right = figure.subplots(1, 2)
    lines = {}
    for row in rows:
        if row.get("share") is None:
            continue
        if row["part"] == "attention":
            lines.setdefault((right, f"{row['how']}, {row['devices']} devices"), []).append(
                (row["tokens"], row["share"])
            )
        else:
            lines.setdefault((left, f"{row['what']}, {row['how']}"), []).append((row["devices"], row["share"]))
    for (axes, label), points in lines.items():
        xs, ys = zip(*sorted(points), strict=True)
        axes.plot(xs, [100 * y for y in ys], marker=".", label=label)
    for axes, name in ((left, "devices"), (right, "tokens of the sequence")):
        axes.set_xscale("log", base=2)
        axes.set(xlabel=name, ylabel="% of one device's rate", ylim=(0, 110))
        if axes.has_data():
            axes.legend(fontsize=6)
