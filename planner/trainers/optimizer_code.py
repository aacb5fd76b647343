"""Each optimizer as Python: what to import, the class, its arguments: for a script or a Trainer's hook.

The signatures are those of the versions that the planner's models name as their sources.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec

from optplan.planner.dtypes import SHORT_NAMES
from optplan.planner.errors import ConfigError
from optplan.planner.trainers.job import TrainingJob

PARAMETERS = "model.parameters()"


class OptimizerCode(msgspec.Struct, frozen=True, kw_only=True):
    """How an optimizer is built in Python.

    Attributes:
        imports: Import statements.
        package: What `pip install` must get, None for torch itself.
        name: The class as written.
        arguments: What comes before the learning rate; `PARAMETERS` where the class needs nothing but parameters.
        keywords: Further arguments.
        before: Lines that prepare the arguments.
        constructor: What is called, the class itself when None.
    """

    imports: tuple[str, ...]
    package: str | None
    name: str
    arguments: str = PARAMETERS
    keywords: dict[str, Any] = {}
    before: tuple[str, ...] = ()
    constructor: str | None = None

    @property
    def takes_parameters_alone(self) -> bool:
        """Whether class and keywords say it all, as `optimizer_cls_and_kwargs` of a Trainer asks."""
        return self.arguments == PARAMETERS and not self.before and self.constructor is None

    def expression(self, rate: str, *, arguments: str | None = None) -> str:
        """The call that builds it.

        Args:
            rate: The learning rate as written.
            arguments: Other parameters than the model's.
        """
        keywords = "".join(f", {key}={value!r}" for key, value in self.keywords.items())
        return f"{self.constructor or self.name}({arguments or self.arguments}, lr={rate}{keywords})"


class _Written(str):
    """An expression that stands in the script as it is, without quotes."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


Builder = Callable[[TrainingJob], OptimizerCode]


def optimizer_code(job: TrainingJob, *, target: str) -> OptimizerCode:
    """The job's optimizer as Python.

    Raises:
        ConfigError: It is not one class over the model's parameters.
    """
    builder = _BUILDERS.get((job.optimizer, job.implementation))
    if builder is None:
        raise ConfigError(
            f"--export {target} is not possible: {job.optimizer} ({job.implementation}) is not a single class over the "
            "model's parameters; build it as its documentation says"
        )
    if "state_dtype" in job.settings and job.implementation != "optplan":
        why = f"{job.optimizer} ({job.implementation}) has no argument for the dtype of its state"
        raise job.refuse(target, why, instead=target)
    return builder(job)


def _torch(name: str, **fixed: Any) -> Builder:
    def build(job: TrainingJob) -> OptimizerCode:
        return OptimizerCode(
            imports=("import torch",), package=None, name=f"torch.optim.{name}", keywords=fixed | job.settings
        )

    return build


def _torch_sgd(**fixed: Any) -> Builder:
    def build(job: TrainingJob) -> OptimizerCode:
        return OptimizerCode(
            imports=("import torch",), package=None, name="torch.optim.SGD", keywords=fixed | job.options
        )

    return build


def _ours(name: str, *, constructor: str | None = None, arguments: str = PARAMETERS) -> Builder:
    def build(job: TrainingJob) -> OptimizerCode:
        keywords = {key: value for key, value in job.settings.items() if key != "state_dtype"}
        if name == "Adapprox":
            keywords = _adapprox_keywords(job.options)
        dtype = job.settings.get("state_dtype")
        if dtype is not None:
            keywords["state_dtype"] = _Written(f"torch.{SHORT_NAMES[dtype]}")
        return OptimizerCode(
            imports=(
                *(["import torch"] if dtype else []),
                f"from optplan.optim_impls import {name}",
            ),
            package="optplan[gpu]",
            name=name,
            keywords=keywords,
            constructor=constructor,
            arguments=arguments,
        )

    return build


def _adapprox_keywords(options: dict[str, Any]) -> dict[str, Any]:
    keywords: dict[str, Any] = {"rank": options["rank"]}
    if options["beta1"] != 0.9:
        keywords["betas"] = (options["beta1"], 0.999)
    if options["mode"] != "fast":
        keywords["mode"] = options["mode"]
    return keywords


def _class(module: str, name: str, package: str, **renamed: str) -> Builder:
    """A class over parameters; `renamed` are options that it calls otherwise."""

    def build(job: TrainingJob) -> OptimizerCode:
        keywords = {renamed.get(key, key): value for key, value in job.settings.items()}
        return OptimizerCode(imports=(f"from {module} import {name}",), package=package, name=name, keywords=keywords)

    return build


def _bitsandbytes(name: str) -> Builder:
    def build(job: TrainingJob) -> OptimizerCode:
        keywords = {key: value for key, value in job.settings.items() if key != "hf_embeddings_32bit"}
        before: tuple[str, ...] = ()
        if job.options["hf_embeddings_32bit"]:
            before = (
                "manager = bnb.optim.GlobalOptimManager.get_instance()",
                "embeddings = [m for m in model.modules() if isinstance(m, torch.nn.Embedding)]",
                '[manager.register_module_override(m, "weight", {"optim_bits": 32}) for m in embeddings]',
            )
        return OptimizerCode(
            imports=("import bitsandbytes as bnb", "import torch"),
            package="bitsandbytes",
            name=f"bnb.optim.{name}",
            keywords=keywords,
            before=before,
        )

    return build


def _low_rank(module: str, name: str, package: str, **group: Any) -> Builder:
    """GaLore and APOLLO: the projected matrices are a parameter group of their own."""

    def build(job: TrainingJob) -> OptimizerCode:
        values = group | {key: value for key, value in job.options.items() if key in ("rank", "scale_type")}
        chosen = (
            "[m.weight for m in model.modules() if isinstance(m, torch.nn.Linear)]"
            if job.options["target"] == "linear"
            else "[p for p in model.parameters() if p.ndim == 2]"
        )
        before = (
            f"projected = {chosen}",
            "ids = {id(p) for p in projected}",
            "others = [p for p in model.parameters() if id(p) not in ids]",
            f"groups = [{{'params': others}}, {{'params': projected, **{values!r}}}]",
        )
        return OptimizerCode(
            imports=(f"from {module} import {name}", "import torch"),
            package=package,
            name=name,
            arguments="groups",
            before=before,
        )

    return build


def _official_adam_mini(job: TrainingJob) -> OptimizerCode:
    sizes = {
        "dim": job.options["dim"] or "model.config.hidden_size",
        "n_heads": job.options["n_heads"] or "model.config.num_attention_heads",
    }
    arguments = "model.named_parameters(), " + ", ".join(f"{key}={value}" for key, value in sizes.items())
    return OptimizerCode(
        imports=("from adam_mini import Adam_mini",),
        package=f"adam-mini=={job.options['version']}",
        name="Adam_mini",
        arguments="named_parameters=" + arguments,
    )


def _official_micro_adam(job: TrainingJob) -> OptimizerCode:
    keywords = {"m": job.options["window"], "k_init": job.options["density"], "quant_block_size": job.options["bucket"]}
    return OptimizerCode(
        imports=("from ista_daslab_optimizers import MicroAdam",),
        package="ista-daslab-optimizers==1.1.15",
        name="MicroAdam",
        keywords=keywords | {"alpha": float(job.options["alpha"])},
    )


def _flash_adamw(job: TrainingJob) -> OptimizerCode:
    master = job.options["master"]
    if master == "auto" and job.config.precision != "bf16":
        master = "none"
    bits: dict[str, dict[str, Any]] = {
        "24bit": {"master_weight_bits": 24},
        "32bit": {"master_weight_bits": 32},
        "none": {"master_weight_bits": None},
    }
    return OptimizerCode(
        imports=("from flashoptim import FlashAdamW",),
        package="flashoptim",
        name="FlashAdamW",
        keywords=bits.get(master, {}),
    )


def _hf_adafactor(job: TrainingJob) -> OptimizerCode:
    keywords: dict[str, Any] = {"scale_parameter": False, "relative_step": False}
    if "beta1" in job.settings:
        keywords["beta1"] = job.options["beta1"]
    return OptimizerCode(
        imports=("from transformers import Adafactor",), package="transformers", name="Adafactor", keywords=keywords
    )


_PYTORCH_OPTIMIZER = "pytorch-optimizer"
_BUILDERS: dict[tuple[str, str], Builder] = {
    ("adamw", "fused"): _torch("AdamW", fused=True),
    ("adamw", "foreach"): _torch("AdamW", foreach=True),
    ("adamw", "for-loop"): _torch("AdamW", foreach=False),
    ("adamw", "optplan"): _ours("AdamW"),
    ("micro-adam", "optplan"): _ours("MicroAdam"),
    ("micro-adam", "official"): _official_micro_adam,
    ("adam-mini", "optplan"): _ours("AdamMini", constructor="AdamMini.from_module", arguments="model"),
    ("adam-mini", "official"): _official_adam_mini,
    ("adapprox", "optplan"): _ours("Adapprox"),
    ("sgd", "fused"): _torch_sgd(fused=True),
    ("sgd", "foreach"): _torch_sgd(foreach=True),
    ("sgd", "for-loop"): _torch_sgd(foreach=False),
    ("adafactor", "torch"): _torch("Adafactor"),
    ("adafactor", "transformers"): _hf_adafactor,
    ("lion", "pytorch_optimizer"): _class("pytorch_optimizer", "Lion", _PYTORCH_OPTIMIZER),
    ("adamw-8bit", "bitsandbytes"): _bitsandbytes("AdamW8bit"),
    ("paged-adamw-8bit", "bitsandbytes"): _bitsandbytes("PagedAdamW8bit"),
    ("adamw-8bit", "torchao"): _class("torchao.optim", "AdamW8bit", "torchao"),
    ("adamw-4bit", "torchao"): _class("torchao.optim", "AdamW4bit", "torchao"),
    ("adamw-fp8", "torchao"): _class("torchao.optim", "AdamWFp8", "torchao"),
    ("galore", "galore_torch"): _low_rank(
        "galore_torch", "GaLoreAdamW", "galore-torch", update_proj_gap=200, scale=0.25, proj_type="std"
    ),
    ("apollo", "apollo_torch"): _low_rank(
        "apollo_torch", "APOLLOAdamW", "apollo-torch", update_proj_gap=200, scale=1.0, proj="random", proj_type="std"
    ),
    ("came", "came_pytorch"): _class("came_pytorch.CAME", "CAME", "came-pytorch"),
    ("sm3", "pytorch_optimizer"): _class("pytorch_optimizer", "SM3", _PYTORCH_OPTIMIZER),
    ("soap", "pytorch_optimizer"): _class(
        "pytorch_optimizer", "SOAP", _PYTORCH_OPTIMIZER, max_precond_dim="max_precondition_dim"
    ),
    ("flash-adamw", "official"): _flash_adamw,
}
