"""Public memory estimators, each asked about a measured training step through its own interface.

Nothing of them is part of this repository: they are imported from where they are installed. Where a step has something
that an estimator's interface does not take, the answer names it; where the nearest thing that it takes would be another
step altogether, there is no answer.
"""

from __future__ import annotations

import importlib.metadata
import json
import logging
import math
import tempfile
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoModel
from transformers.initialization import no_init_weights

from optplan.planner.catalog import load_model
from optplan.planner.models.spec import ModelSpec
from optplan.profilers.workloads.catalogue import model_class_and_config, quiet

GIB = 2**30
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "amp": torch.float32}
ADAM = ("adamw", "adamw_foreach")
NO_STEP = "micro-batch, sequence and checkpointing are no inputs"
MASTERS = "asked for 16-bit training with fp32 master weights"


class Answer(NamedTuple):
    """What an estimator says of a step.

    Attributes:
        predicted_bytes: None where it cannot express the step.
        call: How it was asked.
        note: What of the step it does not take, or why it has no answer.
        is_nearest: Whether it was asked for the nearest number formats that it takes, which are not the step's.
    """

    predicted_bytes: int | None
    call: str
    note: str = ""
    is_nearest: bool = False


class Tool(NamedTuple):
    """An estimator.

    Attributes:
        title: As its makers call it.
        package: What `pip install` takes.
        source: Where it is documented.
        counts: What its figure is the sum of.
        ask: Answers for a case of the records.
    """

    title: str
    package: str
    source: str
    counts: str
    ask: Callable[[dict[str, Any]], Answer]

    @property
    def version(self) -> str:
        """The installed version."""
        return importlib.metadata.version(self.package)


def accelerate(case: dict[str, Any]) -> Answer:
    """The column `Training using Adam` of `accelerate estimate-memory`, for the model built from its configuration."""
    from accelerate import init_empty_weights
    from accelerate.commands.estimate import estimate_training_usage
    from accelerate.utils import calculate_maximum_sizes

    dtype = "float32" if case["precision"] == "fp32" else "float16"
    call = f"max(estimate_training_usage(calculate_maximum_sizes(AutoModel)[0], {dtype!r}).values())"
    if case["optimizer"] not in ADAM:
        return Answer(None, call, "Adam is the only optimizer")
    with init_empty_weights(), quiet():
        model = AutoModel.from_config(_config(case))
    size, _ = calculate_maximum_sizes(model)
    is_nearest = case["precision"] == "bf16"
    note = "asked for mixed precision, bf16 throughout is no input; " if is_nearest else ""
    found = int(max(estimate_training_usage(int(size), dtype).values()))
    return Answer(found, call, note + NO_STEP, is_nearest)


def deepspeed(case: dict[str, Any]) -> Answer:
    """Model states under ZeRO stage 2 on one GPU without offload."""
    from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs

    call = "estimate_zero2_model_states_mem_needs(params, num_gpus_per_node=1, num_nodes=1, cpu_offload=False)"
    if case["optimizer"] not in ADAM:
        return Answer(None, call, "Adam is the only optimizer")
    if case["precision"] == "fp32":
        return Answer(None, call, "only 16-bit training with fp32 master weights")
    _, gpu = estimate_zero2_model_states_mem_needs(case["params"], num_gpus_per_node=1, num_nodes=1, cpu_offload=False)
    return Answer(int(gpu), call, f"{MASTERS}; activations are not counted", is_nearest=True)


def llm_analysis(case: dict[str, Any]) -> Answer:
    """Weights, gradients, optimizer state and activations of `LLMAnalysis.training`."""
    from llm_analysis.analysis import ActivationRecomputation, LLMAnalysis
    from llm_analysis.config import DtypeConfig, GPUConfig, ParallelismConfig, get_model_config_from_hf

    config = _config(case)
    state = _llm_analysis_state(case)
    recomputation = ActivationRecomputation.FULL if case["checkpointing"] else ActivationRecomputation.NONE
    settings = {
        "activation_recomputation": recomputation, "flash_attn": case["attention"] != "eager",
        "mlp_gated_linear_units": config.model_type in ("llama", "qwen2", "gemma2"), **(state or {}),
    }  # fmt: skip
    shown = ", ".join(f"{name}={getattr(value, 'name', value)}" for name, value in settings.items())
    call = f"LLMAnalysis(get_model_config_from_hf(config), w16a16e16).training({shown})"
    if case["precision"] == "fp32":
        return Answer(None, call, "16 bits are the most that weights and activations may have")
    if state is None:
        return Answer(None, call, "an optimizer without a moment for each parameter is no input")
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        model = get_model_config_from_hf(folder)
    gpu = GPUConfig("h200", 141, 4800, 450, 8e-6, 989)
    analysis = LLMAnalysis(model, gpu, DtypeConfig(), ParallelismConfig(), achieved_tflops=300)
    found = analysis.training(
        batch_size_per_gpu=case["batch"], gradient_accumulation_steps=1, global_batch_size=case["batch"],
        seq_len=case["seq"], total_num_tokens=1, **settings,
    )  # fmt: skip
    is_nearest = case["precision"] == "amp"
    size = round(found["(weight+op_state+grad+act)_memory_per_gpu"])
    return Answer(size, call, MASTERS if is_nearest else "", is_nearest)


def _llm_analysis_state(case: dict[str, Any]) -> dict[str, int] | None:
    """Bytes a parameter of master weights (gradients have the same) and of the state beside them."""
    master = 2 if case["precision"] == "bf16" else 4
    # Without 16-bit weights beside them, what is called master weights here is one of Adam's moments.
    moments = {"adamw": 2, "adamw_foreach": 2, "adam_mini": 1, "sgd": 1}.get(case["optimizer"])
    if moments is None:
        return None
    beside = moments if case["precision"] == "amp" else moments - 1
    return {"master_weights_dtype_bytes": master, "other_op_bytes": beside * master}


def gpu_estimator(case: dict[str, Any]) -> Answer:
    """The total of `GPUEstimator.estimate`, with the allowance for the framework that it adds."""
    from gpu_estimator import GPUEstimator

    precision = "fp32" if case["precision"] == "fp32" else "bf16"
    optimizer = {"adamw": "adamw", "adamw_foreach": "adamw", "sgd": "sgd"}.get(case["optimizer"])
    call = (
        f"GPUEstimator().estimate(params, batch_size, sequence_length, precision={precision!r},"
        f" optimizer={optimizer!r}, gradient_checkpointing).total_memory_gb * 2**30"
    )
    if optimizer is None:
        return Answer(None, call, "Adam and SGD are the only optimizers")
    found = GPUEstimator().estimate(
        case["params"], batch_size=case["batch"], sequence_length=case["seq"], precision=precision,
        optimizer=optimizer, gpu_memory_gb=math.inf, gradient_checkpointing=case["checkpointing"],
    )  # fmt: skip
    is_nearest = precision == "bf16"
    note = "asked for 16-bit weights with fp32 state" if is_nearest else ""
    return Answer(round(found.total_memory_gb * GIB), call, note, is_nearest)


def mlsysim(case: dict[str, Any]) -> Answer:
    """The total of `TrainingMemoryModel.solve` on one accelerator without communication buffers."""
    from mlsysim import Hardware
    from mlsysim.core.units import Q_
    from mlsysim.engine.solvers.training import TrainingMemoryModel
    from mlsysim.models.types import TransformerWorkload

    precision = "fp32" if case["precision"] == "fp32" else "bf16"
    # Attention scores are kept only by attention without a fused kernel, which is what its selective leaves out.
    kept = "none" if case["attention"] == "eager" else "selective"
    strategy = "full" if case["checkpointing"] else kept
    optimizer = {"adamw": "adamw", "adamw_foreach": "adamw"}.get(case["optimizer"])
    call = (
        f"TrainingMemoryModel().solve(model, H200, batch_size, seq_len, precision={precision!r}, optimizer='adamw',"
        f" activation_checkpointing={strategy!r}, communication_buffer_fraction=0).total_memory"
    )
    if optimizer is None:
        return Answer(None, call, "Adam, and SGD without momentum, are the only optimizers")
    config = _config(case)
    model = TransformerWorkload(
        name=case["model"], architecture="Transformer", parameters=Q_(case["params"], "count"),
        layers=config.num_hidden_layers, hidden_dim=config.hidden_size, heads=config.num_attention_heads,
    )  # fmt: skip
    found = TrainingMemoryModel().solve(
        model, Hardware.Cloud.H200, case["batch"], seq_len=case["seq"], precision=precision, optimizer=optimizer,
        activation_checkpointing=strategy, communication_buffer_fraction=0,
    )  # fmt: skip
    note = "fp32 master weights beside fp32 weights" if precision == "fp32" else MASTERS
    return Answer(round(found.total_memory.to("byte").magnitude), call, note, is_nearest=True)


def mem_tracker(case: dict[str, Any]) -> Answer:
    """The peak that torch's MemTracker sees over two steps of the real module on fake tensors."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    # Fake tensors of a CUDA device need a build of torch that has CUDA.
    device = "cuda" if torch.cuda.is_available() else "cpu"
    cls, config = model_class_and_config(_spec(case))
    dropped = device == "cpu" and case["attention"] == "sdpa" and _drop_no_attention(config)
    call = f"MemTracker over two steps under FakeTensorMode on {device}, get_tracker_snapshot('peak')['Total']"
    note = "asked without dropout in the attention, with which a CPU runs it unfused; " if dropped else ""
    note += "operations as the CPU runs them" if device == "cpu" else ""
    with FakeTensorMode(), torch.device(device), warnings.catch_warnings(action="ignore"):
        with no_init_weights(), quiet():
            model = cls._from_config(config, attn_implementation=case["attention"], dtype=DTYPES[case["precision"]])
        model.tie_weights()
        if case["checkpointing"]:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        optimizer = _optimizer(model.train(), case["optimizer"])
        if optimizer is None:
            return Answer(None, call, "this optimizer does not step fake tensors")
        ids = torch.zeros(case["batch"], case["seq"], dtype=torch.long)
        size = _tracked_peak(model, optimizer, ids, amp=case["precision"] == "amp")
    return Answer(size, call, note, dropped)


def _drop_no_attention(config: Any) -> bool:
    """Turn the dropout of attention weights off; whether there was any."""
    names = [name for name in ("attn_pdrop", "attention_dropout", "attention_probs_dropout_prob")
             if getattr(config, name, 0)]  # fmt: skip
    for name in names:
        setattr(config, name, 0.0)
    return bool(names)


def _tracked_peak(model: Any, optimizer: torch.optim.Optimizer, ids: torch.Tensor, *, amp: bool) -> int:
    from torch.distributed._tools.mem_tracker import MemTracker

    tracker = MemTracker()
    tracker.track_external(model, optimizer, ids)
    with tracker:
        for _ in range(2):
            tracker.reset_mod_stats()
            with torch.autocast(ids.device.type, torch.bfloat16) if amp else nullcontext():
                loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    (peak,) = tracker.get_tracker_snapshot("peak").values()
    return int(peak["Total"])


def _optimizer(model: Any, name: str) -> torch.optim.Optimizer | None:
    from transformers.optimization import Adafactor

    parameters = list(model.parameters())
    if name == "adafactor":
        return Adafactor(parameters, lr=1e-3, relative_step=False, scale_parameter=False)
    if name == "sgd":
        return torch.optim.SGD(parameters, lr=1e-3, momentum=0.9, fused=True)
    if name in ADAM:
        return torch.optim.AdamW(parameters, lr=1e-3, **{"fused" if name == "adamw" else "foreach": True})
    return None


def _spec(case: dict[str, Any]) -> ModelSpec:
    return load_model(case["model"])


def _config(case: dict[str, Any]) -> Any:
    """The configuration as transformers reads it, by its classes' names for the fields."""
    cls, config = model_class_and_config(_spec(case))
    config.architectures = [cls.__name__]
    return config


def read_cases(path: Path) -> list[dict[str, Any]]:
    """The measured steps of a record that ran."""
    logging.disable(logging.WARNING)
    cases = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [case for case in cases if "error" not in case]


TOOLS = {
    "mem-tracker": Tool(
        "MemTracker of torch", "torch", "torch.distributed._tools.mem_tracker",
        "every storage alive while the real module takes a step on fake tensors", mem_tracker,
    ),
    "llm-analysis": Tool(
        "llm-analysis", "llm-analysis", "https://github.com/cli99/llm-analysis",
        "weights, gradients, optimizer state and activations by formula", llm_analysis,
    ),
    "mlsysim": Tool(
        "mlsysim", "mlsysim", "https://pypi.org/project/mlsysim/",
        "weights, gradients, optimizer state with fp32 masters and activations by formula", mlsysim,
    ),
    "gpu-estimator": Tool(
        "gpu-estimator", "gpu-estimator", "https://pypi.org/project/gpu-estimator/",
        "weights, gradients, optimizer state and activations by formula, and 20 %", gpu_estimator,
    ),
    "accelerate": Tool(
        "accelerate estimate-memory", "accelerate",
        "https://huggingface.co/docs/accelerate/usage_guides/model_size_estimator",
        "the largest of weights, gradients and optimizer state; no activations, as it says", accelerate,
    ),
    "deepspeed": Tool(
        "DeepSpeed ZeRO-2 estimate", "deepspeed", "https://deepspeed.readthedocs.io/en/latest/memory.html",
        "model states alone: 16-bit weights and gradients, fp32 gradients, masters and moments", deepspeed,
    ),
}  # fmt: skip
"""The estimators by id."""
