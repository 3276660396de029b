"""Packages that only some of the work needs, and the extra of the distribution that brings each."""

from importlib.util import find_spec

from safetynet.errors import InputError

DISTRIBUTION = "safetynet-llm"
"""What pip installs; the package that it brings is called `safetynet`."""
EXTRAS = {
    "4bit": ("bitsandbytes",),
    "clusters": ("parsl",),
    "figures": ("joblib", "matplotlib", "PIL", "plotly"),
    "inspect": ("inspect_ai",),
    "lm-eval": ("lm_eval",),
    "mlflow": ("alembic", "mlflow", "sqlalchemy"),
    "runs": ("datasets", "pyarrow"),
    "scan": ("sklearn",),
    "tracking": ("tensorboard", "wandb"),
}
"""Modules by the extra that brings them. `runs` brings `figures` and `scan` as well; `all` is everything
but `mlflow`, whose 85 MB no analysis needs."""


def need(what: str, *modules: str) -> None:
    """Refuse work whose packages are not installed, before it begins.

    Args:
        what: the work; begins the sentence.
        modules: that it imports, each one of `EXTRAS`.

    Raises:
        InputError: if one is not installed; says how to install it.
    """
    for module in modules:
        if find_spec(module) is None:
            extra = next(name for name, brought in EXTRAS.items() if module in brought)
            raise InputError(
                f"{what}: the package {module} is not installed. Run pip install '{DISTRIBUTION}[{extra}]'."
            )
