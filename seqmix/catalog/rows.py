"""A lazy list of every mechanism. Rows are strings and numbers; a mixer is imported when its row is loaded.

What a mixer can do is on its class (the traits), not here: a row only says where it is, what it came from and
which small instances the tests build.
"""

import difflib
import importlib
from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """One mechanism. Sizes in `small` are even, so that two-way sharding divides them."""

    name: str  # short, lower case: what a command line calls it
    target: str  # "module:Class"; the module lies in seqmix/mixers/<group>
    title: str  # of the paper
    paper: str  # arXiv id
    small: dict  # fields of an instance that compiles fast, several chunks in 14 tokens
    variants: tuple[dict, ...] = ()  # fields over `small`, each tested as well
    medium: dict | None = None  # fields of an instance in which matmuls dominate, to check `flops`
    medium_seq: int = 64  # its sequence length: one chunk or block
    state: str = ""  # `state_size(context)` without the variants, in the class's own fields; "": does not decode
    checked: tuple[str, ...] = ()  # "package: function" of docs/peer_checks.md, "(op)" after it for its op alone

    @property
    def class_name(self) -> str:
        return self.target.partition(":")[2]

    @property
    def group(self) -> str:
        """The folder of mixers/: dense, recurrent, ..."""
        return self.target.partition(":")[0].split(".")[2]

    def load(self) -> type:
        """The mixer's class."""
        module, _, name = self.target.partition(":")
        return getattr(importlib.import_module(module), name)


ROWS = (
    Row(
        name="attention",
        target="seqmix.mixers.dense.attention:Attention",
        title="Attention Is All You Need",
        paper="1706.03762",
        small=dict(d_model=8, heads=4, head_dim=4, block=4),
        variants=(
            dict(kv_heads=2, qk_norm=True, sink_logits=True),
            dict(kv_heads=1, window=3, sinks=1, soft_cap=2.0),
            dict(causal=False, rope=False, window=4),
        ),
        medium=dict(d_model=128, heads=4, head_dim=32),
        state="2 * context * kv_heads * head_dim + 1",
        checked=("fla-core: naive_parallel_attn (op)",),
    ),
    Row(
        name="mamba2",
        target="seqmix.mixers.recurrent.mamba2:Mamba2",
        title="Transformers are SSMs: Generalized Models and Efficient Algorithms Through Structured State "
        "Space Duality",
        paper="2405.21060",
        small=dict(d_model=8, d_state=4, head_dim=4, conv_width=3, chunk=4),
        variants=(dict(n_groups=2, conv_width=4),),
        medium=dict(d_model=128, d_state=32, head_dim=32, chunk=64),
        state="(conv_width - 1) * (heads * head_dim + 2 * n_groups * d_state) + heads * head_dim * d_state",
        checked=("mamba-ssm: ssd_minimal_discrete (op)",),
    ),
    Row(
        name="log_linear_mamba2",
        target="seqmix.mixers.recurrent.log_linear_mamba2:LogLinearMamba2",
        title="Log-Linear Attention (with Mamba-2)",
        paper="2506.04761",
        small=dict(d_model=8, max_len=64, d_state=4, head_dim=4, n_groups=2, conv_width=3, chunk=4),
        medium=dict(d_model=128, max_len=64, d_state=32, head_dim=32, chunk=64),
        state="(conv_width - 1) * (heads * head_dim + 2 * n_groups * d_state)"
        " + (context - 1).bit_length() * heads * head_dim * d_state + 1",
        checked=("fla-core: naive_log_linear_attn (op)",),
    ),
    Row(
        name="retnet",
        target="seqmix.mixers.recurrent.retnet:RetNet",
        title="Retentive Network: A Successor to Transformer for Large Language Models",
        paper="2307.08621",
        small=dict(d_model=8, heads=2, chunk=4),
        medium=dict(d_model=128, heads=8, chunk=64),
        state="heads * key_dim * value_dim + 1",
        checked=("torchscale: MultiScaleRetention",),
    ),
    Row(
        name="lightning",
        target="seqmix.mixers.recurrent.lightning:Lightning",
        title="Various Lengths, Constant Speed: Efficient Language Modeling with Lightning Attention",
        paper="2405.17381",
        small=dict(d_model=8, heads=2, chunk=4),
        variants=(dict(decay="paper", lrpe=True),),
        medium=dict(d_model=128, heads=8, chunk=64),
        state="heads * key_dim * value_dim",
        checked=("lightning-attn: linear_attn (op)",),
    ),
    Row(
        name="gla",
        target="seqmix.mixers.recurrent.gla:GLA",
        title="Gated Linear Attention Transformers with Hardware-Efficient Training",
        paper="2312.06635",
        small=dict(d_model=8, heads=2, gate_rank=3, chunk=4, conv_width=3),
        medium=dict(d_model=128, heads=4, chunk=64),
        state="heads * key_dim * value_dim + max(conv_width - 1, 0) * heads * (2 * key_dim + value_dim)",
        checked=("flash-linear-attention: GatedLinearAttention",),
    ),
    Row(
        name="hgrn2",
        target="seqmix.mixers.recurrent.hgrn2:HGRN2",
        title="HGRN2: Gated Linear RNNs with State Expansion",
        paper="2404.07904",
        small=dict(d_model=8, heads=2, chunk=4, lower_bound=0.2, learned_bound=True),
        medium=dict(d_model=128, heads=8, chunk=64),
        state="heads * key_dim * value_dim",
        checked=("flash-linear-attention: HGRN2Attention",),
    ),
    Row(
        name="gateloop",
        target="seqmix.mixers.recurrent.gateloop:GateLoop",
        title="GateLoop: Fully Data-Controlled Linear Recurrence for Sequence Modeling",
        paper="2311.01927",
        small=dict(d_model=8, chunk=4),
        variants=(dict(heads=2, transition="complex"),),
        medium=dict(d_model=256),
        state="2 * d_model * (d_model // heads)",
        checked=("gateloop-transformer: GateLoopedAttention",),
    ),
    Row(
        name="glru",
        target="seqmix.mixers.recurrent.glru:GLRU",
        title="GateLoop: Fully Data-Controlled Linear Recurrence for Sequence Modeling (its later, real-valued code)",
        paper="2311.01927",
        small=dict(d_model=8, chunk=4),
        variants=(dict(tied=False),),
        medium=dict(d_model=256),
        state="width",
        checked=("flax-gated-linear-rnn: GatedLinearRNN",),
    ),
    Row(
        name="rglru",
        target="seqmix.mixers.recurrent.rg_lru:RGLRU",
        title="Griffin: Mixing Gated Linear Recurrences with Local Attention for Efficient Language Models",
        paper="2402.19427",
        small=dict(d_model=8, heads=2, conv_width=3, chunk=4),
        medium=dict(d_model=256, heads=4),
        state="conv_width * width",
        checked=("recurrentgemma: RGLRU",),
    ),
    Row(
        name="linear_attention",
        target="seqmix.mixers.linear.linear_attention:LinearAttention",
        title="Transformers are RNNs: Fast Autoregressive Transformers with Linear Attention",
        paper="2006.16236",
        small=dict(d_model=8, heads=2, chunk=4),
        variants=(dict(feature_map="random", features=6), dict(feature_map="relu", causal=False)),
        medium=dict(d_model=128, heads=4, chunk=16),
        state="heads * key_dim * (value_dim + 1)",
        checked=("fla-core: naive_recurrent_linear_attn (op)",),
    ),
    Row(
        name="hedgehog",
        target="seqmix.mixers.linear.hedgehog:Hedgehog",
        title="The Hedgehog & the Porcupine: Expressive Linear Attentions with Softmax Mimicry",
        paper="2402.04347",
        small=dict(d_model=8, heads=2, chunk=4),
        medium=dict(d_model=128, heads=4, chunk=16),
        state="2 * heads * key_dim * (value_dim + 1) + 1",
        checked=("fla-core: naive_recurrent_linear_attn (op)",),
    ),
    Row(
        name="based",
        target="seqmix.mixers.linear.based:Based",
        title="Simple linear attention language models balance the recall-throughput tradeoff",
        paper="2402.18668",
        small=dict(d_model=8, heads=2, key_dim=4, chunk=4),
        medium=dict(d_model=128, heads=4, key_dim=16, chunk=16),
        state="heads * (1 + key_dim + key_dim * (key_dim + 1) // 2) * (value_dim + 1)",
        checked=("fla-core: naive_parallel_based (op)",),
    ),
    Row(
        name="mamba",
        target="seqmix.mixers.recurrent.mamba:Mamba",
        title="Mamba: Linear-Time Sequence Modeling with Selective State Spaces",
        paper="2312.00752",
        small=dict(d_model=8, d_state=4, dt_rank=2, conv_width=3, chunk=4),
        medium=dict(d_model=256, d_state=8, chunk=64),
        state="expand * d_model * (conv_width - 1 + d_state)",
        checked=("mamba-ssm: Mamba",),
    ),
    Row(
        name="deltanet",
        target="seqmix.mixers.recurrent.delta_net:DeltaNet",
        title="Parallelizing Linear Transformers with the Delta Rule over Sequence Length",
        paper="2406.06484",
        small=dict(d_model=8, heads=2, conv_width=3, chunk=4),
        variants=(dict(conv_width=0, gate=True, beta_max=2.0),),
        medium=dict(d_model=128, heads=4),
        state="heads * key_dim * value_dim + (conv_width - 1) * heads * (2 * key_dim + value_dim)",
        checked=("flash-linear-attention: DeltaNet",),
    ),
    Row(
        name="gated_deltanet",
        target="seqmix.mixers.recurrent.gated_delta_net:GatedDeltaNet",
        title="Gated Delta Networks: Improving Mamba2 with Delta Rule",
        paper="2412.06464",
        small=dict(d_model=8, heads=2, conv_width=3, chunk=4),
        medium=dict(d_model=128, heads=4),
        state="heads * key_dim * value_dim + (conv_width - 1) * heads * (2 * key_dim + value_dim)",
        checked=("flash-linear-attention: GatedDeltaNet",),
    ),
    Row(
        name="log_linear_gated_deltanet",
        target="seqmix.mixers.recurrent.log_linear_gated_delta_net:LogLinearGatedDeltaNet",
        title="Log-Linear Attention (with Gated DeltaNet)",
        paper="2506.04761",
        small=dict(d_model=8, max_len=64, heads=2, conv_width=3, chunk=4),
        medium=dict(d_model=128, max_len=64, heads=4),
        state="(conv_width - 1) * heads * (2 * key_dim + value_dim)"
        " + (context - 1).bit_length() * heads * key_dim * value_dim + 1",
    ),
    Row(
        name="kda",
        target="seqmix.mixers.recurrent.kimi_delta:KimiDeltaAttention",
        title="Kimi Linear: An Expressive, Efficient Attention Architecture",
        paper="2510.26692",
        small=dict(d_model=8, heads=2, gate_rank=3, conv_width=3, chunk=4),
        medium=dict(d_model=128, heads=4),
        state="heads * key_dim * value_dim + (conv_width - 1) * heads * (2 * key_dim + value_dim)",
        checked=("flash-linear-attention: KimiDeltaAttention",),
    ),
    Row(
        name="rwkv7",
        target="seqmix.mixers.recurrent.rwkv7:RWKV7",
        title='RWKV-7 "Goose" with Expressive Dynamic State Evolution',
        paper="2503.14456",
        small=dict(d_model=8, head_dim=4, decay_rank=2, rate_rank=2, gate_rank=3, chunk=4),
        medium=dict(d_model=256, head_dim=32),
        state="d_model * (1 + head_dim)",
        checked=("rwkv: RWKV_x070_TMix_one",),
    ),
    Row(
        name="hyena",
        target="seqmix.mixers.conv.hyena:Hyena",
        title="Hyena Hierarchy: Towards Larger Convolutional Language Models",
        paper="2302.10866",
        small=dict(d_model=8, max_len=64, filter_width=4),
        variants=(dict(order=3, filter_features=5, shift=0.1),),
        medium=dict(d_model=256, max_len=64, filter_width=16),
        state="d_model * ((conv_width - 1) * (order + 1) + context * (order - 1)) + 1",
    ),
    Row(
        name="base_conv",
        target="seqmix.mixers.conv.base_conv:BaseConv",
        title="Zoology: Measuring and Improving Recall in Efficient Language Models",
        paper="2312.04927",
        small=dict(d_model=8),
        medium=dict(d_model=256),
        state="(conv_width - 1) * d_model",
    ),
    Row(
        name="rat",
        target="seqmix.mixers.composite.rat:RAT",
        title="RAT: Bridging RNN Efficiency and Attention Accuracy via Chunk-based Sequence Modeling",
        paper="2507.04416",
        small=dict(d_model=8, heads=2, groups=2, chunk=3),
        variants=(dict(heads=4, chunk=2, block=4),),
        medium=dict(d_model=256, heads=4),
        state="2 * d_model * (context // chunk + 1) + 1",
        checked=("fla-core: naive_recurrent_hgrn (op)",),
    ),
    Row(
        name="mega",
        target="seqmix.mixers.composite.mega:Mega",
        title="Mega: Moving Average Equipped Gated Attention",
        paper="2209.10655",
        small=dict(d_model=8, key_dim=4, chunk=4, block=4),
        variants=(dict(d_state=3, value_dim=6, chunk=64),),
        medium=dict(d_model=128, key_dim=32),
        state="min(context, chunk) * (key_dim + value_dim) + d_model * d_state + 1",
    ),
    Row(
        name="sparse_transformer",
        target="seqmix.mixers.static_sparse.sparse_transformer:SparseTransformer",
        title="Generating Long Sequences with Sparse Transformers",
        paper="1904.10509",
        small=dict(d_model=8, heads=4, head_dim=4, stride=3, block=4),
        variants=(dict(pattern="fixed", stride=4, summary=2, factors="heads", rope=False),),
        medium=dict(d_model=128, heads=4, stride=8),
        state="2 * context * heads * head_dim + 1",
    ),
    Row(
        name="power_attention",
        target="seqmix.mixers.static_sparse.power_attention:PowerAttention",
        title="PowerAttention: Exponentially Scaling of Receptive Fields for Effective Sparse Attention",
        paper="2503.03588",
        small=dict(d_model=8, heads=2, head_dim=4, size=2, window=1, block=4),
        medium=dict(d_model=128, heads=4, size=8),
        state="2 * context * heads * head_dim + 1",
    ),
    Row(
        name="neighbourhood",
        target="seqmix.mixers.static_sparse.neighbourhood:Neighbourhood",
        title="Generalized Neighborhood Attention: Multi-dimensional Sparse Attention at the Speed of Light",
        paper="2504.16922",
        small=dict(d_model=8, heads=2, window=(2, 3), box=(1, 4)),
        variants=(dict(window=(4,), dilation=(2,), causal_axes=(True,), box=(4,)),),
        medium=dict(d_model=128, heads=4, window=(32,)),
    ),
    Row(
        name="moba",
        target="seqmix.mixers.dynamic_sparse.moba:MoBA",
        title="MoBA: Mixture of Block Attention for Long-Context LLMs",
        paper="2502.13189",
        small=dict(d_model=8, heads=2, head_dim=4, size=3, count=2, block=4),
        variants=(dict(heads=4, kv_heads=2, size=2, count=3),),
        medium=dict(d_model=128, heads=4, size=64),
        state="-(-context // size) * (2 * size + 1) * kv_heads * head_dim + 1",
    ),
    Row(
        name="nsa",
        target="seqmix.mixers.dynamic_sparse.native_sparse_attention:NativeSparseAttention",
        title="Native Sparse Attention: Hardware-Aligned and Natively Trainable Sparse Attention",
        paper="2502.11089",
        small=dict(
            **dict(d_model=8, heads=4, kv_heads=2, head_dim=4, size=2, count=3, local=1),
            **dict(compress=4, stride=2, window=3, block=4),
        ),
        variants=(dict(size=3, stride=3, compress=3, pool="mean", branch_kv=False, first=0, count=2),),
        medium=dict(d_model=128, heads=4, kv_heads=2, size=64, compress=32, stride=16),
        state="2 * kv_heads * head_dim * (compress - 1 + -(-context // size) * size + min(context, window)"
        " + max(1, (context - compress) // stride + 1)) + 1",
        checked=("flash-linear-attention: NativeSparseAttention",),
    ),
    Row(
        name="mosa",
        target="seqmix.mixers.dynamic_sparse.mosa:MoSA",
        title="Mixture of Sparse Attention: Content-Based Learnable Sparse Attention via Expert-Choice Routing",
        paper="2505.00315",
        small=dict(d_model=8, heads=4, dense_heads=2, head_dim=4, sparsity=2, block=4),
        variants=(dict(rule="published"), dict(sparsity=3, window=3, rope_fraction=1.0)),
        medium=dict(d_model=128, heads=8, dense_heads=2, head_dim=32, sparsity=2),
        state="2 * (max(1, context // sparsity) * heads + dense_heads * context) * head_dim + heads + 1",
    ),
)


def find(name: str) -> Row:
    """The row with this name, or whose class has it; ValueError with the nearest name if there is none."""
    for row in ROWS:
        if name in (row.name, row.class_name):
            return row
    known = [known for row in ROWS for known in (row.name, row.class_name)]
    near = difflib.get_close_matches(name, known, 1) or difflib.get_close_matches(name.lower(), known, 1)
    hint = f"did you mean {near[0]!r}?" if near else f"the known ones are {', '.join(row.name for row in ROWS)}"
    raise ValueError(f"name: no mixer is called {name!r}; {hint}")


def load(name: str) -> type:
    """The class of the mixer with this name, or of this class name; raises as `find` does."""
    return find(name).load()
