"""The options that several commands share, each written once."""

from __future__ import annotations

import re
from typing import Annotated, Any

import typer


def _integer(text: Any) -> Any:
    """The integer that a text spells; any other text as it is, for the planner to refuse with the range allowed."""
    return int(text) if isinstance(text, str) and re.fullmatch(r"[+-]?[0-9]{1,30}", text) else text


def _count(*names: str, help: str, show_default: bool | str = True) -> Any:
    return typer.Option(*names, parser=_integer, metavar="INTEGER", help=help, show_default=show_default)


_MODEL = (
    "Model: an id or alias of `optplan models`, or the path of a Hugging Face config.json; with --engine trace also "
    "package.module:factory."
)

Model = Annotated[str, typer.Option("--model", "-m", metavar="NAME", help=_MODEL)]
OptionalModel = Annotated[
    str | None,
    typer.Option("--model", "-m", metavar="NAME", help=f"{_MODEL} Needed unless --from names one."),
]
FromFile = Annotated[
    str | None,
    typer.Option(
        "--from",
        metavar="FILE",
        help="Answer for another program's job: HF TrainingArguments, axolotl, LLaMA-Factory or torchtune YAML, "
        "torchtitan TOML, DeepSpeed JSON. Options given here go before it.",
    ),
]
GpuName = Annotated[
    str | None, typer.Option("--gpu", "-g", metavar="ID", help="GPU: an id of `optplan gpus`, such as a100-40g.")
]
Memory = Annotated[
    str | None,
    typer.Option("--memory", metavar="SIZE", help="Instead of --gpu: bytes that torch may allocate, such as 38GiB."),
]
Optimizers = Annotated[
    list[str] | None,
    typer.Option(
        "--optimizer",
        "-o",
        metavar="ID",
        help="Optimizer: an id of `optplan optimizers`; repeatable. All when left out.",
    ),
]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Option of an optimizer, such as window=10 or adam-mini.implementation=official.",
    ),
]
Precision = Annotated[str, typer.Option(help="bf16, fp32, amp, mixed or fp16-amp.")]
StateDtype = Annotated[
    str | None, typer.Option(help="Dtype of the optimizer's moments where it can differ: fp32, bf16 or fp16.")
]
BatchSize = Annotated[int, _count("--batch-size", "-b", help="Sequences in one micro-batch.")]
SeqLen = Annotated[
    int | None, _count("--seq-len", "-s", help="Tokens in a sequence.", show_default="2048 or the model's maximum")
]
GradAccum = Annotated[int, _count("--grad-accum", help="Micro-batches accumulated before each optimizer step.")]
Checkpointing = Annotated[str, typer.Option(help="Activation checkpointing: none, full, full-reentrant or selective.")]
Attention = Annotated[
    str | None,
    typer.Option(help="Attention implementation: sdpa, eager or flash.", show_default="sdpa; eager for Gemma 2"),
]
FusedLoss = Annotated[str, typer.Option(help="Loss that never holds all logits: none, liger or chunked.")]
StepInBackward = Annotated[
    bool, typer.Option("--step-in-backward", help="Take each parameter's step as soon as its gradient is there.")
]
ClipGradNorm = Annotated[
    float | None, typer.Option(metavar="NORM", help="Clip the gradients to this norm before the step.")
]
KeepGrads = Annotated[bool, typer.Option("--keep-grads", help="Keep the gradients' memory: zero_grad(False).")]
PaddingMask = Annotated[bool, typer.Option("--padding-mask", help="Give the model a mask that hides padding.")]
EmptyCache = Annotated[bool, typer.Option("--empty-cache", help="Call torch.cuda.empty_cache() after every step.")]
Gpus = Annotated[int, _count("--gpus", help="Number of GPUs, of all nodes together.")]
Nodes = Annotated[
    int | None, _count("--nodes", help="Machines that the GPUs are spread over.", show_default="as few as hold them")
]
Sharding = Annotated[
    str,
    typer.Option(
        help="How several GPUs divide the work: none, ddp, ddp-copies, zero1, zero1-deepspeed, zero2, zero3, fsdp2, "
        "fsdp2-noreshard, fsdp2-hybrid or fsdp2-offload."
    ),
]
TensorParallel = Annotated[int, _count("--tensor-parallel", help="GPUs that share every layer.")]
SequenceParallel = Annotated[
    bool, typer.Option("--sequence-parallel", help="With --tensor-parallel: share the tokens between blocks too.")
]
PipelineParallel = Annotated[int, _count("--pipeline-parallel", help="Stages of consecutive layers.")]
PipelineSchedule = Annotated[
    str, typer.Option(help="How --grad-accum micro-batches pass through the stages: gpipe, 1f1b or interleaved.")
]
Engine = Annotated[str, typer.Option(help="Where the step's timeline comes from: rules, or trace (needs torch).")]
AllocConf = Annotated[
    str | None,
    typer.Option(
        "--alloc-conf",
        metavar="SETTINGS",
        help="Settings of torch's allocator as in PYTORCH_CUDA_ALLOC_CONF, such as expandable_segments:True.",
    ),
]
Steps = Annotated[int, _count("--steps", help="Steps to run: the third is recorded, those after it are timed.")]
TokensPerStep = Annotated[
    int | None,
    _count("--tokens-per-step", help="Tokens of one optimizer step over all GPUs.", show_default="about 65536"),
]
FixedBatchSize = Annotated[
    int | None, _count("--batch-size", "-b", help="Fix the micro-batch's sequences.", show_default="searched")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")]
Html = Annotated[
    str | None, typer.Option("--html", metavar="FILE", help="Also write the answer as one self-contained HTML page.")
]
Markdown = Annotated[
    str | None, typer.Option("--md", metavar="FILE", help="Also write the answer as Markdown, for issues and reviews.")
]
Filter = Annotated[str | None, typer.Option("--filter", "-f", help="Show only rows that contain this text.")]
