"""The arguments of the trainer, named as in `transformers.TrainingArguments`."""

from dataclasses import dataclass, field, fields

# The arguments with which a training that is resumed must have begun; the others may change, but for `max_steps` where
# the learning rate falls until then
DECISIVE = (
    *("update", "learning_rate", "coefficient_learning_rate", "head_steps", "lr_scheduler_type", "warmup_steps"),
    *("adam_beta1", "adam_beta2", "adam_epsilon"),
    *("per_device_train_batch_size", "gradient_accumulation_steps", "seed", "expert_rows"),
    *("logging_steps", "collapse_guard", "load_best_model_at_end", "metric_for_best_model", "greater_is_better"),
)
# What of the model's config does not show in the names and shapes of its parameters
DECISIVE_OF_MODEL = (
    *("experts_sha256", "save_experts", "save_experts_kwargs", "transform", "transform_kwargs", "coefficient_bounds"),
    "task_vectors_dtype",
)


@dataclass
class TintTrainingArguments:
    """How to train coefficients and tint layers. One step visits every task once in random order.

    The defaults fit the heads first (https://arxiv.org/abs/2202.10054) and then take few steps. Those of Model Tinting
    (https://arxiv.org/abs/2412.19098) are `max_steps=500, head_steps=0, learning_rate=1e-2,
    lr_scheduler_type="constant"`, with the objective "confident_pseudo_label". `HfArgumentParser` reads this class.
    """

    output_dir: str = field(default="tint_output", metadata={"help": "Where models and logs are written."})
    max_steps: int = field(default=60, metadata={"help": "Number of steps; each visits every task once."})
    num_train_epochs: float | None = field(
        default=None, metadata={"help": "Passes over the largest task's data, in the place of `max_steps`."}
    )
    update: str = field(
        default="sequential",
        metadata={"help": "'sequential': one update per task; 'joint': one update on the sum over tasks."},
    )
    learning_rate: float | None = field(
        default=None,
        metadata={
            "help": "Adam's learning rate; None: 3e-3 where the tint layer is the head, 3e-2 where it is a decoder's "
            "final norm, else 1e-3."
        },
    )
    coefficient_learning_rate: float | None = field(
        default=None, metadata={"help": "The coefficients' own; None: `learning_rate`, which is the tint layers'."}
    )
    head_steps: int = field(
        default=100,
        metadata={
            "help": "Steps of each task's head, or final norm, alone before the first step, whose features the merged "
            "model computes once; where that is a tint layer, and not by 'entropy', which would have it predict one "
            "class."
        },
    )
    lr_scheduler_type: str = field(
        default="cosine",
        metadata={
            "help": "'constant', or from `learning_rate` down to 0 at `max_steps`: 'linear' or 'cosine'. A stream has "
            "no last step and keeps `learning_rate`."
        },
    )
    warmup_steps: int = field(default=0, metadata={"help": "Steps in which the learning rates rise from zero."})
    adam_beta1: float = field(default=0.9, metadata={"help": "Adam's beta1."})
    adam_beta2: float = field(default=0.999, metadata={"help": "Adam's beta2."})
    adam_epsilon: float = field(default=1e-8, metadata={"help": "Adam's epsilon."})
    per_device_train_batch_size: int = field(default=32, metadata={"help": "Batch size per task and device."})
    per_device_eval_batch_size: int = field(default=64, metadata={"help": "Batch size without gradients."})
    gradient_accumulation_steps: int = field(default=1, metadata={"help": "Batches per task and update."})
    expert_rows: str = field(
        default="auto",
        metadata={
            "help": "Where the experts' outputs come from: 'cache', computed once ahead and kept with the dataset; "
            "'online', by a forward of the expert beside each of the model's; 'auto', online where they would take "
            "more than 50 MB, where collator or transforms draw at random, and where padding changes them."
        },
    )
    dataloader_num_workers: int = field(default=0, metadata={"help": "Processes that load data."})
    seed: int = field(default=42, metadata={"help": "Seed of the order of tasks and data."})
    bf16: bool | None = field(
        default=None,
        metadata={
            "help": "bfloat16 autocast. None: as Accelerate is configured, or else for a float32 model of a million "
            "parameters on a device that computes bfloat16 natively (`bf16_is_native`).",
            "nargs": "?",
            "const": True,
        },
    )
    fp16: bool = field(default=False, metadata={"help": "float16 autocast with a gradient scaler (not on CPUs)."})
    logging_steps: int = field(default=10, metadata={"help": "Steps between entries of the log."})
    eval_steps: int | None = field(
        default=None, metadata={"help": "Steps between evaluations; None: none in training."}
    )
    save_steps: int | None = field(
        default=None, metadata={"help": "Steps between checkpoints to resume from, also at the end; None: none."}
    )
    save_total_limit: int | None = field(
        default=None, metadata={"help": "Number of checkpoints to keep, the last ones; None: all."}
    )
    load_best_model_at_end: bool = field(
        default=False, metadata={"help": "Go back to the best evaluated state, the start included."}
    )
    metric_for_best_model: str = field(
        default="agreement", metadata={"help": "Mean over tasks by which a state is best; 'agreement' needs no labels."}
    )
    greater_is_better: bool = field(default=True, metadata={"help": "Whether more of that metric is better."})
    collapse_guard: float | None = field(
        default=None,
        metadata={
            "help": "Stop and go back to the best state when the model predicts the expert's classes of a task more "
            "rarely than the start did, by more than this share (0.1) of its samples in `logging_steps` steps, which "
            "should be some hundred; None: never. It costs one more forward a batch."
        },
    )
    report_to: str | list[str] = field(
        default="none", metadata={"help": "Trackers, as in Accelerate: 'tensorboard', 'wandb', ..., 'all' or 'none'."}
    )
    disable_tqdm: bool = field(default=False, metadata={"help": "No progress bars."})

    def __post_init__(self):
        for one in fields(self):
            value = getattr(self, one.name)
            if isinstance(value, str) and "str" not in str(one.type):
                raise ValueError(f"`{one.name}` is the text {value!r}; give a number, such as {one.name}=1e-3.")
        if self.update not in ("sequential", "joint"):
            raise ValueError(f"`update` is {self.update!r}; it must be 'sequential' or 'joint'.")
        if self.lr_scheduler_type not in ("constant", "linear", "cosine"):
            raise ValueError(
                f"`lr_scheduler_type` is {self.lr_scheduler_type!r}; it must be 'constant', 'linear' or 'cosine'."
            )
        if self.expert_rows not in ("auto", "cache", "online"):
            raise ValueError(f"`expert_rows` is {self.expert_rows!r}; it must be 'auto', 'cache' or 'online'.")
        if self.bf16 and self.fp16:
            raise ValueError("`bf16` and `fp16` are both set; choose one.")
        if self.load_best_model_at_end and not self.eval_steps:
            raise ValueError("`load_best_model_at_end` needs `eval_steps`, or there is no state to choose from.")
        if self.collapse_guard is not None and not 0 < self.collapse_guard < 1:
            raise ValueError(f"`collapse_guard` is {self.collapse_guard}; it must be a share between 0 and 1.")
        if self.num_train_epochs is not None and self.num_train_epochs <= 0:
            raise ValueError(f"`num_train_epochs` is {self.num_train_epochs}; it must be above 0.")
        for name in ("max_steps", "head_steps", "warmup_steps", "learning_rate", "coefficient_learning_rate"):
            if (value := getattr(self, name)) is not None and value < 0:
                raise ValueError(f"`{name}` is {value}; it must be at least 0.")
        if self.warmup_steps % 1:
            raise ValueError(f"`warmup_steps` is {self.warmup_steps}; it must be a whole number of steps.")
        counts = ("per_device_train_batch_size", "gradient_accumulation_steps", "logging_steps")
        for name in (*counts, "per_device_eval_batch_size", "eval_steps", "save_steps", "save_total_limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"`{name}` is {value}; it must be at least 1.")

    @property
    def eval_strategy(self) -> str:
        """As transformers' callbacks ask for it."""
        return "steps" if self.eval_steps else "no"
