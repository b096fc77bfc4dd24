"""The schema of everything in `conf/`: one dataclass a group, one comment a field.

Not frozen: Hydra writes into structured configs while it composes.  `OmegaConf.to_object` turns the composed
config into these once, in main; nothing below main sees a Hydra object.
"""

from dataclasses import dataclass, field


@dataclass(slots=True, kw_only=True)
class RunConfig:
    dir: str = "runs/${now:%Y-%m-%d_%H-%M-%S}"  # run folder: config.yaml, metrics.jsonl, checkpoints/, report.html


@dataclass(slots=True, kw_only=True)
class LaunchConfig:
    ranks: int = 1  # local processes to start; ignored under torchrun and Slurm, which say it themselves
    dry_run: bool = False  # check the configuration, print layout and sizes, start nothing
    device: str = "auto"  # auto | cpu | cuda
    restarts: int = 0  # when a rank is lost, start all again from the newest checkpoint, at most this often


@dataclass(slots=True, kw_only=True)
class ModelConfig:
    name: str = "tiny"  # for logs and reports
    num_layers: int = 2  # blocks of attention and MLP
    d_model: int = 64  # width of the residual stream
    num_heads: int = 4  # query heads
    num_kv_heads: int = 4  # fewer than num_heads: grouped-query attention
    head_dim: int = 0  # 0: d_model / num_heads
    num_experts: int = 4  # routed experts a MoE layer
    d_ff: int = 128  # hidden width of one routed expert
    dense_layers_first: int = 0  # this many layers at the bottom have a dense MLP
    moe_every: int = 1  # after those, every n-th layer is MoE (the last of each n), the others dense
    dense_d_ff: int = 0  # hidden width of dense layers; 0: top_k x d_ff (as many active parameters as a MoE layer)
    shared_d_ff: int = 0  # total hidden width of shared experts, which every token visits; 0: none
    activation: str = "swiglu"  # swiglu | gelu | relu
    norm: str = "rmsnorm"  # rmsnorm | layernorm
    norm_eps: float = 1e-5  # added to the variance
    positions: str = "rope"  # rope | learned
    rope_theta: float = 10000.0  # base of the rotary wavelengths
    max_positions: int = 0  # longest sequence; 0: train.seq_len
    qk_norm: bool = False  # RMSNorm on each head's queries and keys
    bias: bool = False  # biases in attention and MLPs (experts included)
    tie_embeddings: bool = True  # the output matrix is the token embedding
    vocab_size: int = 0  # 0: as the data's tokenizer says; rows are padded to a multiple of 128 x tp
    init_std: float = 0.02  # outputs of attention and MLP are scaled by 1 / sqrt(2 x num_layers) on top
    dropout: float = 0.0  # after the embedding, attention and MLP; a function of (seed, sample, layer, position)


@dataclass(slots=True, kw_only=True)
class RouterConfig:
    kind: str = "topk"  # topk | sigmoid | group_limited | noisy_topk | hash | expert_choice
    top_k: int = 2  # experts a token (expert_choice: on average)
    renormalize: bool = True  # the selected weights of a token sum to one
    scale: float = 1.0  # routed weights are multiplied by this (DeepSeek's routed_scaling_factor)
    group: str = "sequence"  # tokens that share capacity and balance: sequence | micro_batch | global (balance loss alone)
    capacity_factor: float = 0.0  # 0: dropless; c: an expert takes at most ceil(c x top_k x tokens / experts) of a group
    drop: str = "position"  # position | probability: who is dropped beyond capacity
    balance_loss: float = 0.01  # weight of the load-balance loss
    z_loss: float = 0.0  # weight of the router z-loss
    bias_update_rate: float = 0.0  # aux-loss-free balancing: step of the selection bias (sigmoid, group_limited)
    num_groups: int = 1  # group_limited: experts are cut into this many groups
    groups_per_token: int = 1  # group_limited: a token's experts come from this many groups
    noise_std: float = 0.0  # noisy_topk: Gaussian noise on the logits, 1 / num_experts is usual


@dataclass(slots=True, kw_only=True)
class ParallelConfig:
    tp: int = 1  # tensor parallel: attention, dense MLP and vocabulary are cut this many ways
    ep: int = 1  # expert parallel: experts are cut this many ways; world = edp x ep x tp
    sequence: bool = True  # with tp: activations outside attention and MLP are cut along the sequence too
    zero: int = 0  # 1: optimizer state and master weights are sharded over the data-parallel ranks (ZeRO-1)


@dataclass(slots=True, kw_only=True)
class StrategyConfig:
    # docs/strategies.md explains them; `strategy=NAME` sets the numbers that belong to one too
    name: str = "eager"  # ddp, eager, serial, fixed, priority, priority_partition, lina_nopack, lina, lina_zero, flow, auto
    partition_bytes: str = "0"  # gradients go on the wire in pieces of at most so many bytes | 0: whole buckets | auto
    bucket_mb: float = 0.0  # ddp: neighbouring gradients are sent together once they have so many MiB
    parts: int = 1  # flow: a micro-batch, or so many micro-batches at a time, walk through the layers in this many parts
    chunks: str = "1"  # pipelining: a MoE layer's rows travel in so many chunks | one number a MoE layer: 1,2,2 | auto
    yields: bool = False  # gradients are held back while tokens are on the wire
    late_layers: int = 0  # so many MoE layers compute the gradients of their experts' weights after all of backward
    windows: str = "none"  # auto: at most as many gradients in each gap of the wire as were measured to fit
    packing: str = "1"  # times as many experts on a device as parallel.ep says: 1 | 2 | 4 ... | auto
    plan: str = ""  # with strategy=auto: FILE, the plan.json that a run of the same job has found; nothing is searched
    packing_memory_gb: float = 0.0  # packed experts of a rank, with gradients and optimizer state, stay below this; 0: no limit


@dataclass(slots=True, kw_only=True)
class OptimConfig:
    name: str = "adamw"  # adamw | sgd
    lr: float = 1e-3  # peak learning rate
    beta1: float = 0.9  # AdamW: decay of the mean of the gradients
    beta2: float = 0.95  # AdamW: decay of the mean of their squares
    eps: float = 1e-8  # AdamW: added to the root of that mean
    weight_decay: float = 0.1  # on matrices; not on norms, biases and embeddings of positions
    clip_norm: float = 1.0  # gradients are scaled down to this global norm; 0: never
    implementation: str = "auto"  # auto | torch | apex: NVIDIA Apex's FusedAdam where it is installed and on CUDA


@dataclass(slots=True, kw_only=True)
class ScheduleConfig:
    name: str = "cosine"  # cosine | wsd | linear | constant
    warmup_steps: int = 0  # linear warm-up from 0 in steps ...
    warmup_tokens: int = 0  # ... or in tokens (only one of the two)
    min_ratio: float = 0.1  # the last learning rate, as a share of the peak
    decay_fraction: float = 0.2  # wsd: this share of the steps decays at the end


@dataclass(slots=True, kw_only=True)
class TrainConfig:
    steps: int = 100  # length of the run; schedules span it whatever exit_step says
    global_batch_size: int = 8  # sequences a step, over all ranks
    micro_batch_size: int = 2  # sequences a forward pass on one data-parallel rank
    seq_len: int = 128  # tokens a sequence
    dtype: str = "float32"  # float32 | bfloat16 (float32 master weights and gradients) | float64
    seed: int = 1234  # of weights, order of the samples, dropout and noise
    recompute: str = "none"  # none | selective (attention and experts) | full: activations computed again in backward
    eval_interval: int = 50  # steps between validations; 0: only at the end
    eval_sequences: int = 64  # sequences of one validation
    resume: str = (
        "auto"  # auto: the newest checkpoint of run.dir | verify: it, its last steps run again | none | a run or checkpoint
    )
    init_from: str = ""  # PATH of a run or checkpoint: its weights, a fresh optimizer
    exit_step: int = 0  # save and stop after this step; 0: run to the end
    max_minutes: float = 0.0  # save and stop after this time; 0: no limit
    ledger: bool = True  # ledger.jsonl: per step hashes of tokens and of each layer's routing, loss and norm to the last bit
    deterministic: bool = False  # only kernels that give the same bits each time (on CPU all do), else an error


@dataclass(slots=True, kw_only=True)
class CheckpointConfig:
    interval: int = 0  # steps between checkpoints; 0: only at the end
    keep_last: int = 2  # newest checkpoints that are kept
    keep_every: int = 0  # checkpoints at multiples of this many steps are kept for ever; 0: none
    async_save: bool = False  # write in the background while training goes on


@dataclass(slots=True, kw_only=True)
class DataConfig:
    kind: str = "stdlib"  # stdlib: source of the interpreter's standard library | prose: its documentation | indexed: .bin/.idx
    prefix: str = ""  # indexed: PREFIX of PREFIX.bin and PREFIX.idx
    blend: list[str] = field(default_factory=list)  # weights and corpora in turn: [0.7, stdlib, 0.3, PREFIX]; instead of prefix
    tokenizer: str = ""  # indexed: sentencepiece .model or Hugging Face tokenizer.json; empty: token ids only, no text samples
    vocab_size: int = 4096  # stdlib, prose: pieces of the tokenizer that is trained (an upper limit)
    split: str = "969,30,1"  # shares of documents for training, validation, test
    cache_dir: str = ".cache/megalina"  # prepared corpora and index files
    reset_positions: bool = True  # positions start anew at document ends
    reset_attention: bool = True  # tokens don't attend to earlier documents of their sequence
    mask_eod: bool = False  # no loss where the input is an end of document
    skip_samples: list[int] = field(default_factory=list)  # FIRST,STOP,...: training sequences, by number, that are passed over


@dataclass(slots=True, kw_only=True)
class WandbConfig:
    mode: str = "offline"  # offline | online | disabled
    project: str = "megalina"  # W&B project
    group: str = ""  # runs of one experiment
    tags: list[str] = field(default_factory=list)  # labels to filter by
    name: str = ""  # empty: the name of the run folder


@dataclass(slots=True, kw_only=True)
class TrackerConfig:
    wandb: WandbConfig = field(default_factory=WandbConfig)
    tensorboard: bool = True  # event files in the run folder
    image_interval: int = 100  # steps between expert-load images in W&B; 0: only at the end
    progress: str = "auto"  # auto: a live bar on a terminal, else a line now and then | plain | none
    samples: int = 3  # texts that the trained model (of up to 2 G parameters) writes for the report; 0: none
    sample_tokens: int = 120  # length of each


@dataclass(slots=True, kw_only=True)
class GuardConfig:
    spike: str = "none"  # a loss that jumps up: none | skip: no update | rewind: to the last checkpoint, and past the data since
    window: int = 64  # losses of so many steps are the measure; no verdict before a quarter of them is there
    threshold: float = 8.0  # a spike is this many robust deviations (1.4826 x median deviation) above the median ...
    min_rise: float = 0.2  # ... and this many nats
    max_spikes: int = 10  # more in a row (rewind: more since the last checkpoint was saved) end the run
    min_entropy: float = 0.3  # a layer whose load has less entropy (1: even) is warned about; 0: never


@dataclass(slots=True, kw_only=True)
class HangConfig:
    timeout_s: float = 120.0  # a step in which a rank stands still for so long ends the job and explains it; 0: never


@dataclass(slots=True, kw_only=True)
class HardwareConfig:
    """What a cluster's devices and links are and how much of them is reached, for simulation.  0: unknown."""

    memory_gib: float = 0.0  # memory of a device
    memory_gbyte_s: float = 0.0  # bandwidth of that memory
    memory_efficiency: float = 0.0  # share of it that a kernel reaches which only moves data
    float32_tflops: float = 0.0  # dense peak of float32 products; of TF32 where they run as such
    bfloat16_tflops: float = 0.0  # dense peak of bfloat16 products
    product_efficiency: float = 0.0  # share of the peak that large matrix products reach
    product_half_size: float = 0.0  # a product with so many rows, or columns, reaches half of what a large one does
    product_sizes: list[float] = field(default_factory=list)  # measured, instead: the smallest of rows, columns and depth; rising
    product_shares: list[float] = field(default_factory=list)  # ... and the share of a large product's rate that each reaches
    attention_efficiency: float = 0.0  # share of the peak that attention's kernel reaches, forward and backward, in model FLOPs
    kernel_us: float = 0.0  # what each kernel costs besides
    host_stage_us: float = 0.0  # what the host needs for an instruction: a device with less to do waits for it
    host_is_device: bool = False  # on CPU: what the host needs for an instruction, also one that sends or waits, comes on top
    domain_ranks: int = 0  # devices that fast links join: an NVLink domain, a PCIe host; it may hold several nodes
    domain_gbyte_s: float = 0.0  # fast link of a device, each way
    domain_latency_us: float = 0.0  # of a fast link, one way
    nics_per_node: int = 0  # adapters that cluster.link_gbit is made of; a device reaches the rate of one
    oversubscription: float = 0.0  # of the switches between nodes: 1: all links at full rate; 2: half of them
    collective_efficiency: float = 0.0  # share of a link's rate that collectives reach


@dataclass(slots=True, kw_only=True)
class ClusterConfig:
    name: str = "local"  # for logs and reports
    peak_tflops: float = 0.0  # dense peak of one device in the run's dtype, for MFU; 0: looked up (GPU) or measured (CPU)
    timeout_s: float = 600.0  # a collective that takes longer ends the job
    nodes: int = 0  # what the cluster is made of: emulated by tools/emulate_cluster.py --like NAME; 0: unknown
    ranks_per_node: int = 0  # devices of a node; 0: unknown
    link_gbit: float = 0.0  # link of a node, each way; 0: unknown
    latency_us: float = 0.0  # of a link, one way
    device_gflops: float = 0.0  # emulated device: what it reaches in attention and experts; 0: no such device
    attention_ms: float = 0.0  # emulated device: forward of a layer's attention, for a whole micro-batch
    experts_ms: float = 0.0  # emulated device: forward of a layer's experts, for a whole micro-batch
    kernel_floor_ms: float = (
        0.0  # emulated device: what an instruction costs besides its share; 0: 2% of the whole micro-batch's time
    )
    hardware: HardwareConfig = field(default_factory=HardwareConfig)


@dataclass(slots=True, kw_only=True)
class InferConfig:
    """How experts are placed at inference; the files of conf/infer."""

    name: str = "static"  # for reports
    predictor: str = "none"  # none, static, window, ema, distribution, path_table, linear_map, online_map, look_ahead[_online]
    planner: str = "none"  # none: experts stay where training had them | first_fit | greedy | hierarchical
    split: str = "even"  # of an expert's rows over its replicas: even | load_aware | local_first
    trigger: str = "never"  # plan anew once the router has spoken: never | always | ordered_top | top_set | distance | gain
    slots_per_device: int = 0  # places for experts on a device, in each layer; 0: twice what the experts need
    first_planned: int = 0  # MoE layer from which on placements are planned before the router speaks
    worth: float = 0.0  # a plan is followed if it lowers the largest expected load by more than this share
    path_length: int = 3  # path_table: layers that a token's path goes back
    kept: int = 0  # path_table: so many likely experts of each path count; 0: all; -1: as many as the router's top_k
    renormalise: bool = True  # path_table: what is kept sums to 1
    layers_back: int = 3  # linear_map, online_map: layers whose counts the next layer's are foreseen from
    window_batches: int = 1  # window: batches that it averages
    distance: float = 0.2  # trigger distance: L1 distance of shares, up to 2
    row_us: float = 0.0  # trigger gain: what a row more on the busiest device costs; 0: measured before serving
    replan_ms: float = 0.0  # trigger gain: what planning anew costs; 0: measured before serving
    swap_mib: float = 0.0  # memory of a device for experts on their way, over all layers, in MiB; 0: two layers' slots
    combine_chunks: int = 1  # a layer's rows go back in so many parts, each once its slots have computed; 1: all at once
    batch_invariant: bool = False  # what becomes of a token doesn't depend on who else goes to its experts
    even_routing: bool = False  # tokens go to experts in turn, whatever the router says: a bound, its text means nothing


@dataclass(slots=True, kw_only=True)
class ProfileConfig:
    """A sample of routing that is saved with each checkpoint, for serving to start from."""

    record: bool = False  # checkpoints get a routing.npz once the balance loss is stable; not with expert choice or capacity
    tokens: int = 16384  # at most so many, from all ranks together
    last_steps: int = 8  # they are of the last so many steps before the checkpoint
    window: int = 20  # the balance loss is stable when its mean over so many steps ...
    stable_change: float = 0.02  # ... differs by at most this share from the mean over as many steps before


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
