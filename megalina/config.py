"""The schema of everything in `conf/`: one dataclass a group; of each field its default, what it may be, and a comment.

Below it, facts of a configuration that need no blocks.

Not frozen: Hydra writes into structured configs while it composes.  `OmegaConf.to_object` turns the composed
config into these once, in main; nothing below main sees a Hydra object.
"""

from dataclasses import dataclass, field

from megalina.setting import BELOW_ONE, LARGEST_COUNT, LARGEST_SIZE, POSITIVE, setting
from megalina.setting import LARGEST_FACTOR as LARGEST_FACTOR
from megalina.setting import choices_of as choices_of
from megalina.setting import settings as settings

ROUTERS = (
    "topk", "sigmoid", "group_limited", "group_limited_softmax", "noisy_topk", "hash", "expert_choice", "locmoe", "locmoe_plus",
    "locmoe_plus_learned", "dense",
)  # fmt: skip
LOCAL_TASKS = ("cloze", "brackets", "next_line", "arithmetic")


@dataclass(slots=True, kw_only=True)
class RunConfig:
    dir: str = "runs/${now:%Y-%m-%d_%H-%M-%S}"  # run folder: config.yaml, metrics.jsonl, checkpoints/, report.html


@dataclass(slots=True, kw_only=True)
class LaunchConfig:
    # local processes to start; ignored under torchrun and Slurm, which say it themselves
    ranks: int = setting(1, low=1, high=1_000_000)
    dry_run: bool = False  # check the configuration, print layout and sizes, start nothing
    device: str = setting("auto", choices=("auto", "cpu", "cuda"))  # auto: a GPU where there is one
    # when a rank is lost, start all again from the newest checkpoint, at most this often
    restarts: int = setting(0, high=LARGEST_COUNT)


@dataclass(slots=True, kw_only=True)
class ModelConfig:
    name: str = "tiny"  # for logs and reports
    num_layers: int = setting(2, low=1, high=100_000)  # blocks of attention and MLP
    d_model: int = setting(64, low=1)  # width of the residual stream
    num_heads: int = setting(4, low=1)  # query heads
    num_kv_heads: int = setting(4, low=1)  # fewer than num_heads: grouped-query attention
    head_dim: int = setting(0)  # 0: d_model / num_heads
    # mixture of attention heads (DS-MoE): number of groups of query heads, each scaled by its probability; 0: none
    attention_experts: int = setting(0)
    # gqa: grouped-query attention; mla: multi-head latent attention (DeepSeek-V2); docs/attention.md says which family needs what
    attention: str = setting("gqa", choices=("gqa", "mla"))
    q_lora_rank: int = setting(0)  # mla: numbers of a token that its queries are made of; 0: they are made of the stream
    kv_lora_rank: int = setting(0)  # mla: numbers of a token that its keys and values are made of
    qk_nope_head_dim: int = setting(0)  # mla: numbers of a head's query and key that know no position
    qk_rope_head_dim: int = setting(0)  # mla: numbers that positions turn; all heads have this part of the key in common
    v_head_dim: int = setting(0)  # mla: numbers of a head's value
    window: int = setting(0)  # sliding window: tokens that a token sees, itself among them; 0: all before it
    full_attention_every: int = setting(0)  # with a window, every n-th layer (the last of each n) sees all; 0: none does
    attention_sinks: bool = False  # a learned score of each head that joins the softmax and gives nothing (gpt-oss)
    num_experts: int = setting(4, low=1, high=1 << 20)  # routed experts a MoE layer
    d_ff: int = setting(128, low=1)  # hidden width of one routed expert
    dense_layers_first: int = setting(0)  # this many layers at the bottom have a dense MLP
    moe_every: int = setting(1, low=1)  # after those, every n-th layer is MoE (the last of each n), the others dense
    dense_d_ff: int = setting(0)  # hidden width of dense layers; 0: top_k x d_ff (as many active parameters as a MoE layer)
    shared_d_ff: int = setting(0)  # total hidden width of shared experts, which every token visits; 0: none
    # between the matrices of an MLP; swiglu_clamped: gate x sigmoid(1.702 gate) x (up + 1) with clamped inputs (gpt-oss)
    activation: str = setting("swiglu", choices=("swiglu", "swiglu_clamped", "gelu", "relu"))
    activation_limit: float = setting(7.0, low=POSITIVE)  # swiglu_clamped: the gate is at most this, the other within +- this
    norm: str = setting("rmsnorm", choices=("rmsnorm", "layernorm"))  # before attention, before the MLP and before the head
    norm_eps: float = setting(1e-5)  # added to the variance
    # rope: queries and keys are rotated; learned: an embedding for each position
    positions: str = setting("rope", choices=("rope", "learned"))
    rope_theta: float = setting(10000.0, low=POSITIVE)  # base of the rotary wavelengths
    rotary_fraction: float = setting(1.0, low=POSITIVE, high=1)  # share of a head that turns, from its first number on
    # longer contexts; linear: positions are divided by rope_factor; yarn: slow pairs are, fast ones stay
    rope_scaling: str = setting("none", choices=("none", "linear", "yarn"))
    rope_factor: float = setting(1.0, low=1, high=1e6)  # by how much the context grows
    rope_original_positions: int = setting(0)  # yarn: the context before
    rope_beta_fast: float = setting(32.0, low=1e-6, high=1e6)  # yarn: a pair that turns so often in that context stays
    rope_beta_slow: float = setting(1.0, low=1e-6, high=1e6)  # yarn: one that turns no more than this is slowed by rope_factor
    rope_truncate: bool = True  # yarn: these bounds are whole pairs
    rope_mscale: float = setting(0.0, high=1e3)  # yarn: DeepSeek's mscale; 0: not given
    # yarn: DeepSeek's mscale_all_dim, by which mla scales its scores too; 0: not given
    rope_mscale_all_dim: float = setting(0.0, high=1e3)
    # yarn: cosines and sines are multiplied by this; 0: as factor and mscales say
    rope_attention_factor: float = setting(0.0, high=1e3)
    max_positions: int = setting(0)  # longest sequence; 0: train.seq_len
    # RMSNorm on queries and keys; head: on each head's; projection: on all heads' together
    qk_norm: str = setting("none", choices=("none", "head", "projection"))
    bias: bool = False  # biases in attention and MLPs (experts included)
    # biases in attention; auto: all where `bias` is set, else none; qkv: of queries, keys and values; all: of the output, too
    attention_bias: str = setting("auto", choices=("auto", "none", "qkv", "all"))
    shared_gate: bool = False  # what the shared experts give is times sigmoid(token x a learned vector) (Qwen2-MoE, Qwen3-Next)
    tie_embeddings: bool = True  # the output matrix is the token embedding
    vocab_size: int = setting(0)  # 0: as the data's tokenizer says; rows are padded to a multiple of 128 x tp
    # outputs of attention and MLP are scaled by 1 / sqrt(2 x num_layers) on top
    init_std: float = setting(0.02, high=LARGEST_FACTOR)
    # after the embedding, attention and MLP; a function of (seed, sample, layer, position)
    dropout: float = setting(0.0, high=BELOW_ONE)
    # multi-token prediction: number of extra layers, like the last one; in training each predicts one token further ahead
    mtp_layers: int = setting(0, high=1000)
    mtp_loss: float = setting(0.3, high=LARGEST_FACTOR)  # weight of their losses' mean
    layer: list[str] = field(default_factory=lambda: ["attention", "ffn"])  # blocks of a layer; own ones as folder/file.py:Name


@dataclass(slots=True, kw_only=True)
class RouterConfig:
    # how tokens and experts choose each other; see the files of conf/router
    kind: str = setting("topk", choices=ROUTERS, own=True)
    # experts a token (expert_choice: on average; dense: where it is served with infer.select=top_k)
    top_k: int = setting(2, low=1)
    renormalize: bool = True  # the selected weights of a token sum to one
    # routed weights are multiplied by this (DeepSeek's routed_scaling_factor)
    scale: float = setting(1.0, low=POSITIVE, high=LARGEST_FACTOR)
    # tokens that share capacity and balance; global: balance loss alone
    group: str = setting("sequence", choices=("sequence", "micro_batch", "global"))
    # 0: dropless; c: an expert takes at most ceil(c x top_k x tokens / experts) of a group
    capacity_factor: float = setting(0.0, high=1e6)
    # locmoe: capacity is LocMoE's lower bound, from how near tokens are to their experts' rows, clamped; see docs/locality.md
    capacity_bound: str = setting("none", choices=("none", "locmoe"))
    # of the cosines between the tokens of a step and the rows of their experts, which one the bound is of
    capacity_delta: str = setting("min", choices=("min", "quantile", "mean"))
    capacity_quantile: float = setting(0.05, low=POSITIVE, high=BELOW_ONE)  # capacity_delta=quantile: the share below it
    # a step's delta moves the one in use: ema x old + (1 - ema) x new; 0: the first step's stays
    capacity_ema: float = setting(0.0, high=BELOW_ONE)
    capacity_min: int = setting(1, low=1)  # tokens of a group that an expert takes at least, whatever the bound says
    # who is dropped beyond capacity: the last, or the least probable
    drop: str = setting("position", choices=("position", "probability"))
    balance_loss: float = setting(0.01, high=LARGEST_FACTOR)  # weight of the load-balance loss
    z_loss: float = setting(0.0, high=LARGEST_FACTOR)  # weight of the router z-loss
    # weight of the loss that keeps tokens on the node where their sequence is at home (LocMoE)
    locality_loss: float = setting(0.0, high=LARGEST_FACTOR)
    locality_nodes: int = setting(0, high=1 << 16)  # nodes where sequences and experts are at home, whatever the layout; 0: none
    # weight of DS-MoE's loss: experts get as much as each other, each token is sure of its own; over the tokens of router.group
    mutual_information_loss: float = setting(0.0, high=LARGEST_FACTOR)
    bias: bool = False  # a learned bias on the logits (gpt-oss)
    # aux-loss-free balancing: step of the selection bias (sigmoid, group_limited)
    bias_update_rate: float = setting(0.0, high=LARGEST_FACTOR)
    # an expert's selection bias moves by the rate: sign: up or down; proportional: times (1 / experts - its share of the choices)
    bias_update: str = setting("sign", choices=("sign", "proportional"))
    bias_centered: bool = False  # bias_update=sign: less the mean over experts, so that the biases' sum stays
    num_groups: int = setting(1, low=1)  # group_limited and its softmax kin: experts are cut into this many groups
    groups_per_token: int = setting(1, low=1)  # ... and a token's experts come from this many of them
    noise_std: float = setting(0.0, high=LARGEST_FACTOR)  # noisy_topk: Gaussian noise on the logits, 1 / num_experts is usual
    temperature: float = setting(1.0, low=POSITIVE, high=LARGEST_FACTOR)  # locmoe and its kin: scores are divided by it
    losses: list[str] = field(default_factory=list)  # your own auxiliary losses, each as folder/file.py:Name
    # FILE of tools/record_routing.py or import_routing.py: tokens of training go to the experts that it says; docs/router-twin.md
    replay: str = ""
    replay_validation: str = ""  # as well, of validation

    @property
    def has_capacity(self) -> bool:
        """Whether an expert may refuse tokens that chose it."""
        return self.capacity_factor > 0 or self.capacity_bound != "none"


@dataclass(slots=True, kw_only=True)
class ParallelConfig:
    tp: int = setting(1, low=1)  # tensor parallel: attention, dense MLP and vocabulary are cut this many ways
    ep: int = setting(1, low=1)  # expert parallel: experts are cut this many ways; world = pp x edp x ep x cp x tp
    cp: int = setting(1, low=1)  # context parallel: each sequence is cut this many ways, docs/long-context.md
    # with cp, how a token sees its sequence: keys and values are gathered | heads are exchanged for tokens
    cp_kind: str = setting("all_gather", choices=("all_gather", "all_to_all"))
    # pipeline parallel: number of ranks that the model's stages are spread over, in the order of strategy.pipeline
    pp: int = setting(1, low=1, high=10_000)
    pp_chunks: int = setting(1, low=1, high=1000)  # stages on each of them
    # which layers are in each stage, as Megatron writes it, Et*3|t*3L say; empty: so that the dearest stage has fewest FLOPs
    pp_layout: str = ""
    placement: str = ""  # FILE of tools/place_experts.py: in which order experts lie on the ranks; empty: in their own
    rebalance_interval: int = setting(0, high=LARGEST_COUNT)  # steps after which experts change ranks for even loads; 0: never
    # what of a token goes to its experts' ranks: a row for each of its experts | once_per_rank: one row, whose experts' weighted
    # sum comes back as one | once_per_node (gloo): one row to each node, passed on there | auto: what saves a tenth of the bytes
    dispatch: str = setting("rows", choices=("rows", "once_per_rank", "once_per_node", "auto"))
    # gradients are summed over all ranks alike | by_node: inside nodes, between them, inside them again | auto: by_node where
    # gloo sums over several nodes of several ranks
    reduce: str = setting("auto", choices=("flat", "by_node", "auto"))
    sequence: bool = True  # with tp: activations outside attention and MLP are cut along the sequence too
    zero: int = setting(0, high=1)  # 1: optimizer state and master weights are sharded over the data-parallel ranks (ZeRO-1)


@dataclass(slots=True, kw_only=True)
class StrategyConfig:
    # auto, a file of conf/strategy (`strategy=NAME` takes its numbers, too; docs/strategies.md explains them), or your own as
    # folder/file.py:FUNCTION
    name: str = "eager"
    partition_bytes: str = "0"  # gradients are sent in pieces of at most this many bytes | 0: whole buckets | auto
    bucket_mb: float = setting(0.0, high=1e9)  # ddp: neighbouring gradients are sent together once they reach this many MiB
    # with parallel.pp: gpipe | 1f1b | interleaved | zb_h1 | zbv | dualpipev | greedy | FILE.csv, which docs/pipelines.md explains
    pipeline: str = "1f1b"
    # flow: a micro-batch, or so many micro-batches at a time, walk through the layers in this many parts; pair: each micro-batch
    parts: int = setting(1, low=1, high=1024)
    chunks: str = "1"  # pipelining: number of chunks of a MoE layer's rows | one number per MoE layer: 1,2,2 | auto
    yields: bool = False  # gradients are held back while tokens are on the wire
    # number of MoE layers whose experts' weight gradients are computed after all of backward
    late_layers: int = setting(0, high=100_000)
    # whose weights' gradients are instructions of their own, which a strategy may put under all-to-alls; all: of every product
    deferred_weights: str = setting("none", choices=("none", "experts", "all"))
    # gradients that are deferred, or last, are computed at once for all parts and chunks: larger products, and a sum that is
    # written once; rows wait for the last part, and are copied
    join_weights: bool = False
    # MiB of activations and gradients that deferred weight gradients may keep alive; 0: no limit
    deferred_mb: float = setting(0.0, high=1e9)
    # lancet: layers of the forward pass walk in parts, so that one computes while another's tokens travel: none | a number of
    # parts | ranges such as attention.0..mix.3:2 | auto: the ranges and numbers that are fastest in virtual time on `cluster`
    partition: str = "none"
    # backward of what went forward in parts; whole: the parts side by side, mirrored: in turn
    partition_backward: str = setting("whole", choices=("whole", "mirrored"))
    # Muon: a bucket's directions are made under the so-manieth all-to-all after its gradients were sent; 0: behind the verdict
    newton_schulz_after: int = setting(0, high=100_000)
    # auto: at most as many gradients in each gap of the wire as were measured to fit
    windows: str = setting("none", choices=("none", "auto"))
    packing: str = "1"  # times as many experts on a device as parallel.ep says: 1 | 2 | 4 ... | auto
    plan: str = ""  # with strategy=auto or search: FILE, the plan.json that a run of the same job has found; nothing is searched
    order: str = ""  # of all instructions, a line each: what strategy.plan=FILE gives; not to be written by hand
    # search, auto: steps in virtual time that a rank's search may take; auto takes fewer where lists are long, and none with 0
    search_evaluations: int = setting(32_000, low=0, high=10_000_000)
    # search, auto: MiB of activations that a list may hold beyond the plan before it; 0: no limit, under auto what was measured
    search_mb: float = setting(0.0, high=1e9)
    # packed experts of a rank, with gradients and optimizer state, stay below this; 0: no limit
    packing_memory_gb: float = setting(0.0, high=1e9)


@dataclass(slots=True, kw_only=True)
class OptimConfig:
    name: str = setting("adamw", choices=("adamw", "sgd", "muon", "muon_clip"), own=True)  # which optimizer
    lr: float = setting(1e-3, high=LARGEST_FACTOR)  # peak learning rate
    beta1: float = setting(0.9, high=BELOW_ONE)  # AdamW: decay of the mean of the gradients
    beta2: float = setting(0.95, high=BELOW_ONE)  # AdamW: decay of the mean of their squares
    eps: float = setting(1e-8)  # AdamW: added to the root of that mean
    weight_decay: float = setting(0.1, high=LARGEST_FACTOR)  # on matrices; not on norms, biases and embeddings of positions
    clip_norm: float = setting(1.0)  # gradients are scaled down to this global norm; 0: never
    # apex: NVIDIA's FusedAdam; auto: that one where it is installed and on CUDA
    implementation: str = setting("auto", choices=("auto", "torch", "apex"))
    muon_momentum: float = setting(0.95, high=BELOW_ONE)  # Muon: share of the momentum that a step keeps
    muon_nesterov: bool = True  # Muon: the gradient counts once more beside the momentum
    # Muon: times optim.lr; match_rms_adamw: 0.2 sqrt(larger side), original: sqrt(max(1, rows / columns)), spectral: without 0.2
    muon_scale: str = setting("match_rms_adamw", choices=("match_rms_adamw", "original", "spectral", "none"))
    muon_steps: int = setting(5, low=1, high=100)  # Muon, of Newton-Schulz: X becomes a X + (b A + c A A) X, with A = X X'
    muon_a: float = setting(3.4445, low=-1e3, high=1e3)  # Muon: a
    muon_b: float = setting(-4.7750, low=-1e3, high=1e3)  # Muon: b
    muon_c: float = setting(2.0315, low=-1e3, high=1e3)  # Muon: c
    muon_dtype: str = setting("main", choices=("main", "bfloat16"))  # Muon: of these products; main: as the main weights
    # Muon, of matrices that tp cuts; gather: made whole over tp first, blocks: each rank's by itself: depends on parallel.tp
    muon_tp: str = setting("gather", choices=("gather", "blocks"))
    muon_routers: bool = False  # Muon: takes routers too
    # muon_clip: queries and keys are scaled down until no attention logit of the step would have been above this
    qk_clip: float = setting(100.0, low=POSITIVE, high=LARGEST_FACTOR)
    qk_clip_alpha: float = setting(0.5, high=1)  # the queries' share of that, as a power; the keys have the rest


@dataclass(slots=True, kw_only=True)
class ScheduleConfig:
    # how the learning rate goes after the warm-up; wsd: warm-up, stable, decay
    name: str = setting("cosine", choices=("cosine", "wsd", "linear", "constant"))
    warmup_steps: int = setting(0, high=LARGEST_COUNT)  # linear warm-up from 0 in steps ...
    warmup_tokens: int = setting(0, high=LARGEST_COUNT)  # ... or in tokens (only one of the two)
    min_ratio: float = setting(0.1, high=1)  # the last learning rate, as a share of the peak
    decay_fraction: float = setting(0.2, high=1)  # wsd: this share of the steps decays at the end
    mtp_final_fraction: float = setting(0.0, high=1)  # for this share of the steps at the end, model.mtp_loss is times ...
    mtp_final_ratio: float = setting(1.0, high=LARGEST_FACTOR)  # ... this (DeepSeek-V3: 0.3, then 0.1)


@dataclass(slots=True, kw_only=True)
class TrainConfig:
    steps: int = setting(100, low=1, high=LARGEST_COUNT)  # length of the run; schedules span it whatever exit_step says
    global_batch_size: int = setting(8, low=1, high=1 << 24)  # sequences a step, over all ranks
    micro_batch_size: int = setting(2, low=1, high=1 << 24)  # sequences a forward pass on one data-parallel rank
    seq_len: int = setting(128, low=1)  # tokens a sequence
    # bfloat16: with float32 master weights and gradients
    dtype: str = setting("float32", choices=("float32", "bfloat16", "float64"))
    seed: int = setting(1234, high=2**63 - 1)  # of weights, order of the samples, dropout and noise
    # activations that backward computes again; selective: those of attention and experts
    recompute: str = setting("none", choices=("none", "selective", "full"))
    eval_interval: int = setting(50, high=LARGEST_COUNT)  # steps between validations; 0: only at the end
    eval_sequences: int = setting(64, low=1)  # sequences of one validation
    # auto: the newest checkpoint of run.dir | verify: it, its last steps run again | none | a run or checkpoint
    resume: str = "auto"
    # go on although settings differ that change the data's order, what the saved state means or, with init_from, the model
    allow_changes: bool = False
    init_from: str = ""  # PATH of a run or checkpoint: its weights, a fresh optimizer
    exit_step: int = setting(0, high=LARGEST_COUNT)  # save and stop after this step; 0: run to the end
    max_minutes: float = setting(0.0, high=1e9)  # save and stop after this time; 0: no limit
    ledger: bool = True  # ledger.jsonl: per step hashes of tokens and of each layer's routing, loss and norm to the last bit
    # steps between collections of Python's garbage, on all ranks after the same ones; 0: whenever Python likes, on each by itself
    gc_interval: int = setting(50, high=LARGEST_COUNT)
    # on CPU, with glibc: memory that a step frees stays with its process, and the next step has no page faults for it
    keep_memory: bool = True
    deterministic: bool = False  # only kernels that give the same bits each time (on CPU all do), else an error


@dataclass(slots=True, kw_only=True)
class CheckpointConfig:
    interval: int = setting(0, high=LARGEST_COUNT)  # steps between checkpoints; 0: only at the end
    keep_last: int = setting(2, low=1, high=LARGEST_COUNT)  # newest checkpoints that are kept
    keep_every: int = setting(0, high=LARGEST_COUNT)  # checkpoints at multiples of this many steps are kept for ever; 0: none
    async_save: bool = False  # write in the background while training goes on


@dataclass(slots=True, kw_only=True)
class DataConfig:
    # stdlib: source of the interpreter's standard library; prose: its documentation; indexed: .bin/.idx
    kind: str = setting("stdlib", choices=("stdlib", "prose", "indexed"))
    prefix: str = ""  # indexed: PREFIX of PREFIX.bin and PREFIX.idx
    blend: list[str] = field(default_factory=list)  # weights and corpora in turn: [0.7, stdlib, 0.3, PREFIX]; instead of prefix
    tokenizer: str = ""  # indexed: sentencepiece .model or Hugging Face tokenizer.json; empty: token ids only, no text samples
    # stdlib, prose: pieces of the tokenizer that is trained (an upper limit)
    vocab_size: int = setting(4096, low=1, high=1 << 24)
    split: str = "969,30,1"  # shares of documents for training, validation, test
    cache_dir: str = ".cache/megalina"  # prepared corpora and index files
    reset_positions: bool = True  # positions start anew at document ends
    reset_attention: bool = True  # tokens don't attend to earlier documents of their sequence
    mask_eod: bool = False  # no loss where the input is an end of document
    skip_samples: list[int] = field(default_factory=list)  # FIRST,STOP,...: training sequences, by number, that are passed over


@dataclass(slots=True, kw_only=True)
class WandbConfig:
    mode: str = setting("offline", choices=("offline", "online", "disabled"))  # offline: kept in the run folder, to be sent later
    project: str = "megalina"  # W&B project
    group: str = ""  # runs of one experiment
    tags: list[str] = field(default_factory=list)  # labels to filter by
    name: str = ""  # empty: the name of the run folder


@dataclass(slots=True, kw_only=True)
class TrackerConfig:
    wandb: WandbConfig = field(default_factory=WandbConfig)
    tensorboard: bool = True  # event files in the run folder
    image_interval: int = setting(100, high=LARGEST_COUNT)  # steps between expert-load images in W&B; 0: only at the end
    # auto: a live bar on a terminal, else a line now and then, as plain does always
    progress: str = setting("auto", choices=("auto", "plain", "none"))
    samples: int = setting(3)  # texts that the trained model (of up to 2 G parameters) writes for the report; 0: none
    sample_tokens: int = setting(120, low=1)  # length of each


@dataclass(slots=True, kw_only=True)
class GuardConfig:
    # a loss that jumps up: skip: no update; rewind: to the last checkpoint, and past the data since
    spike: str = setting("none", choices=("none", "skip", "rewind"))
    window: int = setting(64, low=8)  # number of recent losses to compare with; no verdict before a quarter of them
    # a spike is this many robust deviations (1.4826 x median deviation) above the median ...
    threshold: float = setting(8.0, low=POSITIVE)
    min_rise: float = setting(0.2)  # ... and this many nats
    # more in a row (rewind: more since the last checkpoint was saved) end the run
    max_spikes: int = setting(10, high=LARGEST_COUNT)
    min_entropy: float = setting(0.3, high=1)  # a layer whose load has less entropy (1: even) is warned about; 0: never


@dataclass(slots=True, kw_only=True)
class HangConfig:
    # a step in which a rank stands still for so long ends the job and explains it; 0: never
    timeout_s: float = setting(120.0, high=1e9)


@dataclass(slots=True, kw_only=True)
class HardwareConfig:
    """What a cluster's devices and links are and how much of them is reached, for simulation.  0: unknown."""

    memory_gib: float = setting(0.0, high=1e9)  # memory of a device
    memory_gbyte_s: float = setting(0.0, high=1e9)  # bandwidth of that memory
    memory_efficiency: float = setting(0.0, high=1)  # share of it that a kernel reaches which only moves data
    float32_tflops: float = setting(0.0, high=1e9)  # dense peak of float32 products; of TF32 where they run as such
    bfloat16_tflops: float = setting(0.0, high=1e9)  # dense peak of bfloat16 products
    product_efficiency: float = setting(0.0, high=1)  # share of the peak that large matrix products reach
    # number of rows, or columns, with which a product reaches half the rate of a large one
    product_half_size: float = setting(0.0, high=LARGEST_SIZE)
    product_sizes: list[float] = field(default_factory=list)  # measured, instead: the smallest of rows, columns and depth; rising
    product_shares: list[float] = field(default_factory=list)  # ... and the share of a large product's rate that each reaches
    # share of the peak that attention's kernel reaches, forward and backward, in model FLOPs
    attention_efficiency: float = setting(0.0, high=1)
    kernel_us: float = setting(0.0, high=1e9)  # what each kernel costs besides
    host_stage_us: float = setting(0.0, high=1e9)  # what the host needs for an instruction: a device with less to do waits for it
    host_is_device: bool = False  # on CPU: what the host needs for an instruction, also one that sends or waits, comes on top
    # devices that fast links join: an NVLink domain, a PCIe host; it may hold several nodes
    domain_ranks: int = setting(0, high=1_000_000)
    domain_gbyte_s: float = setting(0.0, high=1e9)  # fast link of a device, each way
    domain_latency_us: float = setting(0.0, high=1e9)  # of a fast link, one way
    # adapters that cluster.link_gbit is made of; a device reaches the rate of one
    nics_per_node: int = setting(0, high=1_000_000)
    oversubscription: float = setting(0.0, high=1e9)  # of the switches between nodes: 1: all links at full rate; 2: half of them
    collective_efficiency: float = setting(0.0, high=1)  # share of a link's rate that collectives reach


@dataclass(slots=True, kw_only=True)
class ClusterConfig:
    name: str = "local"  # for logs and reports
    # dense peak of one device in the run's dtype, for MFU; 0: looked up (GPU) or measured (CPU)
    peak_tflops: float = setting(0.0)
    timeout_s: float = setting(600.0, low=POSITIVE, high=1e9)  # a collective that takes longer ends the job
    # what the cluster is made of: emulated by tools/emulate_cluster.py --like NAME; 0: unknown
    nodes: int = setting(0, high=1_000_000)
    ranks_per_node: int = setting(0, high=1_000_000)  # devices of a node; 0: unknown
    link_gbit: float = setting(0.0, high=1e9)  # link of a node, each way; 0: unknown
    latency_us: float = setting(0.0, high=1e9)  # of a link, one way
    device_gflops: float = setting(0.0, high=1e15)  # emulated device: what it reaches in attention and experts; 0: no such device
    attention_ms: float = setting(0.0, high=1e9)  # emulated device: forward of a layer's attention, for a whole micro-batch
    experts_ms: float = setting(0.0, high=1e9)  # emulated device: forward of a layer's experts, for a whole micro-batch
    # emulated device: what an instruction costs besides its share; 0: 2% of the whole micro-batch's time
    kernel_floor_ms: float = setting(0.0, high=1e9)
    hardware: HardwareConfig = field(default_factory=HardwareConfig)


@dataclass(slots=True, kw_only=True)
class InferConfig:
    """How experts are placed at inference; the files of conf/infer."""

    name: str = "static"  # for reports
    # none, static, window, ema, distribution, path_table, linear_map, online_map, online_paths, look_ahead[_online]
    predictor: str = "none"
    # none: experts stay where training had them | first_fit | first_fit_filled (no slot stays free) | greedy | hierarchical
    planner: str = "none"
    split: str = "even"  # of an expert's rows over its replicas: even | load_aware | local_first
    trigger: str = "never"  # plan anew once the router has spoken: never | always | ordered_top | top_set | distance | gain
    slots_per_device: int = 0  # places for experts on a device, in each layer; 0: twice what the experts need
    first_planned: int = 0  # MoE layer from which on placements are planned before the router speaks
    worth: float = 0.0  # a plan is followed if it lowers the largest expected load by more than this share
    path_length: int = 3  # path_table, online_paths: layers that a token's path goes back
    kept: int = 0  # path_table: number of likely experts that count per path; 0: all; -1: the router's top_k
    renormalise: bool = True  # path_table: what is kept sums to 1
    layers_back: int = 3  # linear_map, online_map, online_paths: layers whose counts the next layer's are foreseen from
    window_batches: int = 1  # window: batches that it averages
    distance: float = 0.2  # trigger distance: L1 distance of shares, up to 2
    row_us: float = 0.0  # trigger gain: what a row more on the busiest device costs; 0: measured before serving
    replan_ms: float = 0.0  # trigger gain: what planning anew costs; 0: measured before serving
    swap_mib: float = 0.0  # memory of a device for experts on their way, over all layers, in MiB; 0: two layers' slots
    combine_chunks: int = 1  # number of parts in which a layer's rows go back, each as its slots are done; 1: all at once
    dispatch: str = "rows"  # rows: one for each expert of a token | once_per_rank: one for each device that has some of them
    batch_invariant: bool = False  # what becomes of a token doesn't depend on who else goes to its experts
    # which experts a token uses of a model of router=dense: none, dense (all) | top_k | threshold (those above it) |
    # threshold_top_k (as many of the most probable as are above it on average, rounded half up); weights stay as they are
    select: str = "none"
    select_k: int = 0  # select=top_k: experts per token; 0: router.top_k
    select_threshold: float = 0.5  # in even shares: an expert is selected if its probability is more than this many of them
    even_routing: bool = False  # tokens go to experts in turn, whatever the router says: a bound, its text means nothing


@dataclass(slots=True, kw_only=True)
class ProfileConfig:
    """A sample of routing that is saved with each checkpoint, for serving to start from."""

    record: bool = False  # checkpoints get a routing.npz once the balance loss is stable; not with expert choice or capacity
    tokens: int = setting(16384, low=1, high=1 << 24)  # maximum number, over all ranks
    last_steps: int = setting(8, low=1, high=1_000_000)  # number of steps before the checkpoint that they are taken from
    window: int = setting(20, low=1, high=1_000_000)  # the balance loss is stable when its mean over this many steps ...
    stable_change: float = setting(0.02, high=1e9)  # ... differs by at most this share from the mean over as many steps before


@dataclass(slots=True, kw_only=True)
class EvalConfig:
    """Local tasks in training: docs/evaluation.md."""

    interval: int = setting(0, high=LARGEST_COUNT)  # steps between scores, of which the last step has some, too; 0: none
    tasks: list[str] = field(default_factory=lambda: list(LOCAL_TASKS))  # some of cloze, brackets, next_line, arithmetic
    examples: int = setting(64, low=2, high=1 << 20)  # of a task, at most
    seed: int = setting(0, high=2**63 - 1)  # which ones


@dataclass(slots=True, kw_only=True)
class TimelineConfig:
    metrics: bool = False  # per step: how long the device stood still for tokens and gradients, how much all-to-alls were slowed
    trace_steps: list[int] = field(default_factory=list)  # steps of which all ranks' timelines are written: RUN/trace.json.gz


@dataclass(slots=True, kw_only=True)
class PretrainConfig:
    run: RunConfig = field(default_factory=RunConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    router: RouterConfig = field(default_factory=RouterConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    strategy: StrategyConfig = field(default_factory=StrategyConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    data: DataConfig = field(default_factory=DataConfig)
    tracker: TrackerConfig = field(default_factory=TrackerConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    hang: HangConfig = field(default_factory=HangConfig)
    timeline: TimelineConfig = field(default_factory=TimelineConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)


BYTES = {"float32": 4, "bfloat16": 2, "float64": 8}  # train.dtype -> of one number


def training_layers(model: ModelConfig) -> range:
    """Of the model, and behind them those of multi-token prediction."""
    return range(model.num_layers + model.mtp_layers)


def is_moe_layer(model: ModelConfig, layer: int) -> bool:
    """Layers of multi-token prediction are as the last layer."""
    above = min(layer, model.num_layers - 1) - model.dense_layers_first
    return above >= 0 and above % model.moe_every == model.moe_every - 1


def padded_vocab_size(vocab_size: int, tp: int) -> int:
    """Rows of the embedding: a multiple of 128 on each tensor-parallel rank."""
    return -(-vocab_size // (128 * tp)) * 128 * tp
