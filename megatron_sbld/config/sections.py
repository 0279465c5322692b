"""The training config: one frozen dataclass a section, with Megatron's own field names where Megatron has the concept.

Values come from a YAML file and, over it, from the command line. A field's type says what it may hold (fields.py);
`validate` refuses that and what cannot work before anything starts, naming the field, its value and what is allowed.
The `drop` section is in `megatron_sbld.method.config`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from megatron_sbld.fields import BelowOne, Count, CountOrZero, In, NotNegative, Positive, PositiveShare, Whole
from megatron_sbld.method.config import DropConfig
from megatron_sbld.words import Normalization, TransformerImpl

Precision = Literal["fp32", "bf16", "fp16"]
"""Of the weights that a layer computes with."""
TextFormat = Literal["auto", "text", "jsonl", "wikitext", "dataset"]
"""What text is read from to be scored."""
RecomputedModule = Literal["core_attn", "mlp", "layernorm"]
"""Parts of a layer that are recomputed by themselves."""
TimeoutMinutes = Annotated[float, In("[0.1, 100000]")]
"""Healthy ranks can be silent for seconds while they start."""
MAX_SEED = 2**31 - 1
"""Of weights and data: NumPy's generators take 32 bits, and Megatron adds to the seed for stages and ranks."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The GPT: sizes and architecture."""

    num_layers: Count = 24
    """Transformer layers in the whole model."""
    hidden_size: Count = 1024
    """Width of the residual stream."""
    num_attention_heads: Count = 16
    """Attention heads; hidden_size must be divisible by it unless kv_channels is given."""
    ffn_hidden_size: Count | None = None
    """Width of the MLP; None is 4 * hidden_size (with swiglu 8/3 of it, rounded up to a multiple of 64)."""
    num_query_groups: Count | None = None
    """Key/value heads for grouped-query attention; None is num_attention_heads."""
    kv_channels: Count | None = None
    """Size of a head; None is hidden_size / num_attention_heads."""
    seq_length: Count = 2048
    """Tokens of a training sample."""
    max_position_embeddings: Count | None = None
    """Learned positions; None is seq_length."""
    position_embedding_type: Literal["learned_absolute", "rope"] = "learned_absolute"
    """How positions enter the model."""
    rotary_base: Count = 10000
    """Base of the rotary embedding."""
    rotary_percent: PositiveShare = 1.0
    """Share of a head that is rotated."""
    normalization: Normalization = "LayerNorm"
    """Normalisation of the layers' inputs and of the output."""
    layernorm_epsilon: Positive = 1e-5
    """Epsilon of the normalisation."""
    activation_func: Literal["gelu", "gelu_tanh"] = "gelu"
    """GeLU of an MLP without swiglu: exact (gelu), or its tanh approximation (gelu_tanh), which the published GPT-2 has
    and which Megatron-LM computes on GPUs, where it fuses GeLU with the bias by default. Only gelu_tanh is fused."""
    swiglu: bool = False
    """SwiGLU instead of GeLU in the MLP."""
    add_bias_linear: bool = True
    """Biases in the linear layers."""
    untie_embeddings_and_output_weights: bool = False
    """An output layer of its own instead of the word embeddings."""
    hidden_dropout: BelowOne = 0.1
    """Dropout on the branches and embeddings."""
    attention_dropout: BelowOne = 0.1
    """Dropout on the attention probabilities."""
    init_method_std: Positive = 0.02
    """Standard deviation of the initial weights."""
    make_vocab_size_divisible_by: Count = 128
    """The vocabulary is padded to a multiple of this times tensor_model_parallel_size."""
    transformer_impl: TransformerImpl = "auto"
    """Layer spec; auto takes Transformer Engine where it is installed, else megatron-core's own modules."""

    @property
    def context(self) -> int:
        """Most tokens that the model takes at once: its learned positions, or the length that it is trained with."""
        learned = self.position_embedding_type == "learned_absolute"
        return self.max_position_embeddings or self.seq_length if learned else self.seq_length


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How the model is spread over processes; data parallelism takes what the others leave."""

    tensor_model_parallel_size: Count = 1
    """Ranks that share each layer."""
    pipeline_model_parallel_size: Count = 1
    """Pipeline stages, each with some of the layers."""
    num_virtual_stages_per_pipeline_rank: Annotated[int, Whole(2)] | None = None
    """Model chunks of a pipeline rank (interleaved 1F1B); None is the plain schedule."""
    pipeline_model_parallel_layout: str | None = None
    """Which layers each stage holds, in Megatron's notation: Et*3|t*5L is 3 layers after the embedding on the first of
    two stages, 5 before the loss on the second. With interleaving one part for each chunk, in the order of the layers.
    None is as many on each."""
    context_parallel_size: Count = 1
    """Ranks that share each sequence."""
    sequence_parallel: bool = False
    """Split the sequence outside of attention and MLP over the tensor-parallel ranks."""
    use_distributed_optimizer: bool = False
    """Shard optimizer state over data-parallel ranks."""
    overlap_grad_reduce: bool = False
    """Reduce gradients while the backward pass runs."""
    overlap_param_gather: bool = False
    """Gather parameters while forward runs; needs use_distributed_optimizer and overlap_grad_reduce."""
    ddp_bucket_size: Count | None = None
    """Parameters of a gradient bucket; None is Megatron's default."""
    deallocate_pipeline_outputs: bool = True
    """Free a stage's output once it is sent, as Megatron-LM always does."""
    distributed_backend: Literal["auto", "nccl", "gloo"] = "auto"
    """auto is nccl where CUDA is available, else gloo."""
    distributed_timeout_minutes: TimeoutMinutes = 10.0
    """A rank that dies, gives no sign of life, or lets others wait for longer than this ends the run on all ranks, with
    exit status 76 and a message that names it and the iteration; start the run again to go on from its last checkpoint.
    (Where all ranks of a machine are stopped, torchrun takes 30 s more to kill them.)
    Longer than any rank may take alone while the others wait for it, such as for building shuffles of the data."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which tokens are read; data sets are written by `megatron-sbld prepare` or Megatron-LM's preprocess_data.py."""

    train_data_path: list[str] = field(default_factory=list)
    """Prefixes of .bin/.idx files, each optionally preceded by its weight in the blend."""
    valid_data_path: list[str] = field(default_factory=list)
    """The same for validation; empty means no validation."""
    tokenizer: str = "byte"
    """byte, a tokenizer.json, or a folder with vocab.json and merges.txt (or tokenizer.json)."""
    data_cache_path: str | None = None
    """Where shuffles are cached; None is a folder beside the run."""
    num_workers: CountOrZero = 0
    """Processes that load data ahead of each rank."""
    eod_mask_loss: bool = False
    """Leave out of the loss what is predicted from an end-of-document token, as Megatron does. How microbatches with
    different numbers of tokens then count: training.calculate_per_token_loss."""
    reset_position_ids: bool = False
    """Restart learned positions after an end-of-document token."""
    reset_attention_mask: bool = False
    """Keep attention within documents."""
    lambada_path: str | None = None
    """LAMBADA's passages (plain text or JSON lines), scored every training.task_interval iterations and at the end."""
    perplexity_path: str | None = None
    """Text or a data set whose perplexity is computed as often: by token, word and byte, in sliding windows."""
    perplexity_format: TextFormat = "auto"
    """What perplexity_path is; auto goes by file names; wikitext must be set."""


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Adam and its learning-rate schedule."""

    lr: Positive = 3e-4
    """Highest learning rate."""
    min_lr: NotNegative = 3e-5
    """Lowest learning rate, at the end of the decay."""
    lr_decay_style: Literal["constant", "linear", "cosine", "inverse-square-root", "WSD"] = "cosine"
    """Shape of the decay."""
    lr_decay_iters: Count | None = None
    """Iterations over which the rate decays; None is train_iters."""
    lr_warmup_iters: CountOrZero = 0
    """Iterations over which the rate rises linearly."""
    lr_warmup_init: NotNegative = 0.0
    """Rate at which the warm-up begins."""
    lr_decay_samples: Count | None = None
    """The same by samples; None is train_samples. Only with train_samples."""
    lr_warmup_samples: CountOrZero = 0
    """The same by samples. Only with train_samples."""
    lr_wsd_decay_iters: Count | None = None
    """Iterations of WSD's final decay; needed by WSD."""
    lr_wsd_decay_style: Literal["exponential", "linear", "cosine", "minus_sqrt"] = "exponential"
    """Shape of WSD's final decay."""
    lr_schedule_by: Literal["iterations", "layer_tokens"] = "iterations"
    """What drives warm-up and decay. iterations: the iterations that are done, or their samples. layer_tokens: the
    tokens that each layer has processed, summed over layers and divided by their number (random-LTD's LayerToken rate),
    so that the rate waits while little runs. The warm-up then lasts for what lr_warmup_iters undropped iterations
    process, which takes more iterations; the decay ends at what the run is forecast to process in lr_decay_iters. A
    weight decay that changes follows as well. Nothing dropped: the same rate as iterations, bit for bit."""
    weight_decay: NotNegative = 0.1
    """Of all weights but biases and norms."""
    start_weight_decay: NotNegative | None = None
    """Weight decay at the beginning, where it changes over the run."""
    end_weight_decay: NotNegative | None = None
    """Weight decay at the end, where it changes over the run."""
    weight_decay_incr_style: Literal["constant", "linear", "cosine"] = "constant"
    """How the weight decay goes from the first to the second value."""
    adam_beta1: BelowOne = 0.9
    """Decay of the mean of the gradients."""
    adam_beta2: BelowOne = 0.95
    """Decay of the mean of their squares."""
    adam_eps: Positive = 1e-8
    """Added to the root of that mean."""
    clip_grad: NotNegative = 1.0
    """Largest norm of the gradients; 0 does not clip."""
    log_num_zeros_in_grad: bool = False
    """Log how many gradients are zero."""


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Length, batch, precision, recomputation and validation of a run."""

    micro_batch_size: Count = 1
    """Samples of one forward pass on a replica."""
    global_batch_size: Count = 8
    """Samples of an iteration, over all replicas and microbatches."""
    rampup_batch_size: list[int] | None = None
    """[start, increment, samples]: the global batch grows from start by increment over samples."""
    train_iters: Count | None = None
    """Iterations of the run; give either this or train_samples."""
    train_samples: Count | None = None
    """Samples of the run; give either this or train_iters."""
    eval_interval: CountOrZero = 100
    """Iterations between validations; 0 validates at the end alone."""
    eval_iters: Count = 10
    """Global batches of a validation."""
    task_interval: CountOrZero = 0
    """Iterations between evaluations of data.lambada_path and data.perplexity_path; 0 evaluates at the end alone."""
    seed: Annotated[int, Whole(0, MAX_SEED)] = 1234
    """Seed of weights, data order and dropout."""
    precision: Precision = "bf16"
    """Of the weights that a layer computes with."""
    calculate_per_token_loss: bool = False
    """What counts alike in the gradient. true: each token of the global batch. false, Megatron's default: each
    microbatch's mean (with context parallelism that of each rank's part), so that with data.eod_mask_loss the gradient
    depends on micro_batch_size and on the layout. Without eod_mask_loss both give the same gradient. Logged losses are
    means over tokens with both. In fp16, true takes a loss scale lower by about the tokens of a replica's batch."""
    cross_entropy_loss_fusion: bool | None = None
    """Megatron's loss in compiled functions, with fewer passes over the logits; in bf16 alone. None takes it where it
    pays: on a GPU in bf16, where torch can compile."""
    torch_compile: bool = False
    """Each layer's forward and backward pass in training as one graph of torch's compiler, with the local layers (not
    Transformer Engine's): fewer kernels. Compiling takes up to a minute of the first iteration, and again where a
    microbatch has another shape. Not with tensor or context parallelism, overlap_param_gather, selective recomputation,
    or branches that drop.residual fused scales."""
    initial_loss_scale: Positive = 2.0**32
    """fp16: the dynamic loss scale at the start."""
    min_loss_scale: Positive = 1.0
    """fp16: its lower limit."""
    loss_scale_window: Count = 1000
    """fp16: iterations without overflow after which it doubles."""
    hysteresis: Count = 2
    """fp16: overflows after which it is halved."""
    loss_scale: Positive | None = None
    """fp16: a constant scale; None is dynamic."""
    recompute_granularity: Literal["full", "selective"] | None = None
    """What the backward pass recomputes instead of keeping activations: whole layers (full), or parts of each
    (selective)."""
    recompute_method: Literal["uniform", "block"] | None = None
    """full: layers in groups of equal size (uniform), or the first layers of each stage (block)."""
    recompute_num_layers: Count | None = None
    """full: layers of a group, or layers of a stage that are recomputed."""
    recompute_modules: list[RecomputedModule] | None = None
    """selective: what is recomputed; None is core_attn."""
    exit_after_iterations: Count | None = None
    """Save and stop after this many iterations of this process's life (for job time limits). Not with torchrun's
    --max-restarts, which starts the run again at once."""


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """What is saved, and what a run starts from. Checkpoints are in the run folder's `checkpoints/`."""

    save_interval: CountOrZero = 0
    """Iterations between checkpoints; 0 saves at the end alone."""
    save_at_end: bool = True
    """Save when the run is complete."""
    keep_last: Count | None = None
    """Checkpoints that are kept; None keeps all."""
    resume: Literal["auto", "never", "always"] = "auto"
    """auto continues from the run folder's newest complete checkpoint if there is one; always requires one; never
    refuses a run folder that has one."""
    load: str | None = None
    """Checkpoint of another run to start from: its weights, or with load_optimizer all of its state. Once the run
    folder has a checkpoint of its own, the run goes on from that."""
    load_optimizer: bool = False
    """With load: all of its state, not only the weights."""
    replan: bool = False
    """Let a run go on with another length, batch size, training.seed, seq_length or other training data: the learning
    rate, the drops and the order of the data are planned anew, and samples that were read may come again. Without it
    such a change is refused."""
    async_save: bool = False
    """Write checkpoints in the background while training goes on."""


@dataclass(frozen=True, kw_only=True)
class LoggingConfig:
    """What is written down while a run goes on."""

    run_dir: str = "runs/default"
    """The run folder."""
    log_interval: Count = 1
    """Iterations between lines on the console; metrics.jsonl has every iteration."""
    tensorboard: bool = True
    """Write curves for TensorBoard into the run folder."""
    progress: Literal["auto", "bar", "lines", "none"] = "auto"
    """auto shows a bar on a terminal and lines elsewhere."""
    wandb_project: str | None = None
    """Log to Weights & Biases under this project; needs the wandb package."""
    wandb_name: str | None = None
    """Name of the run there."""
    peak_tflops: Positive | None = None
    """Peak TFLOP/s of one device; when given, model FLOPs utilisation is logged as well."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """A whole run: every section of a config file."""

    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    drop: DropConfig = field(default_factory=DropConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
