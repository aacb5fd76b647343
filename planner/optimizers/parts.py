"""The state tensors that most optimizers share, each with its size written out."""

from __future__ import annotations

from optplan.planner.dtypes import ITEMSIZE_BYTES, Dtype
from optplan.planner.tensors import Device, Parameter, StateTensor


def tensor(
    name: str,
    shape: tuple[int, ...],
    dtype: Dtype,
    *,
    device: Device = "device",
    why: str = "",
    storage: int | None = None,
) -> StateTensor:
    """A state tensor whose formula is its shape times its itemsize, followed by `why`.

    Args:
        name: State name.
        shape: Sizes, outermost first.
        dtype: Element type.
        device: Where it lives.
        why: What the sizes are, such as `one a row`.
        storage: Elements of the storage behind it, where it is a view of something larger.
    """
    sizes = " x ".join(str(size) for size in shape) or "1"
    formula = f"{sizes} x {ITEMSIZE_BYTES[dtype]} B" + (f" ({why})" if why else "")
    return StateTensor(name, shape, dtype, device, storage, formula)


def like_parameter(name: str, parameter: Parameter, dtype: Dtype, *, why: str = "") -> StateTensor:
    """A state tensor of the parameter's shape."""
    return tensor(name, parameter.shape, dtype, why=why)


def step_counter(device: Device) -> StateTensor:
    """The fp32 scalar that counts a tensor's steps."""
    return tensor("step", (), "float32", device=device)
