"""Places in the network: what can be read and changed, in which layers, with which indices.

In: a model. Out: `Site`s that exist in it. A site names no position; an edit does.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from safetynet.errors import InputError
from safetynet.models.blocks import decoder_layers
from safetynet.models.parts import Parts, Shape, adapters, parts, shape

COMPONENTS = (
    "embedding", "resid_pre", "query", "key", "value", "attention", "head", "attn_out",
    "resid_mid", "router", "expert", "mlp_out", "resid_post", "adapter",
)  # fmt: skip
"""In the order in which a layer computes them; adapters lie anywhere in it."""
WIDE = ("embedding", "resid_pre", "key", "value", "adapter")
"""Components that later positions of the same layer read."""
INDEXED = ("head", "query", "key", "value", "attention", "router", "expert")


@dataclass(frozen=True, order=True)
class Site:
    """A place in the network.

    `embedding` is what enters layer 0, `head` is one head's output before the output projection,
    `attention` its pattern, `router` the weight of each expert, `expert` what one expert adds, `adapter` the
    LoRA update of one module.
    """

    component: str
    layer: int
    index: int | None = None
    """Head, key-value head or expert; None for all of them."""
    module: str = ""
    """For `adapter`: the module's path in its layer, such as `self_attn.q_proj`; "" for all of the layer."""

    def __str__(self) -> str:
        index = "" if self.index is None else f".{self.index}"
        return f"{self.component}{f' {self.module}' if self.module else ''} {self.layer}{index}"


@dataclass(frozen=True)
class Anatomy:
    """A model's layers and sizes, looked up once."""

    model: Any
    layers: tuple[Parts, ...]
    shape: Shape

    @classmethod
    def of(cls, model: Any) -> "Anatomy":
        """Look a model up; errors as in `decoder_layers`."""
        return cls(model, tuple(parts(layer) for layer in decoder_layers(model)), shape(model))

    @cached_property
    def adapters(self) -> tuple[dict[str, Any], ...]:
        """For each layer its LoRA modules by path; looked up once, since every check of a site asks."""
        return tuple(adapters(one.layer) for one in self.layers)

    def components(self) -> list[str]:
        """Components that this model has."""
        return [component for component in COMPONENTS if self._has(component)]

    def sites(self, component: str) -> list[Site]:
        """Every site of one component, layer by layer; heads and experts one by one.

        Raises:
            InputError: if this model has no such component.
        """
        self._check_component(component)
        if component == "embedding":
            return [Site(component, 0)]
        layers = range(self.shape.layers)
        if component == "adapter":
            return [Site(component, i, module=name) for i in layers for name in self.adapters[i]]
        if component in INDEXED:
            return [Site(component, i, index) for i in layers for index in range(self.count(component))]
        return [Site(component, i) for i in layers]

    def count(self, component: str) -> int:
        """How many heads or experts a layer has."""
        if component in ("router", "expert"):
            return self.shape.experts
        return self.shape.kv_heads if component in ("key", "value") else self.shape.heads

    def check(self, site: Site) -> Site:
        """The site itself.

        Raises:
            InputError: if it does not exist here; the message says what does.
        """
        self._check_component(site.component)
        last = 0 if site.component == "embedding" else self.shape.layers - 1
        if not 0 <= site.layer <= last:
            raise InputError(f"site {site}: layer {site.layer} does not exist; there are 0 to {last}.")
        if site.index is not None:
            count = self.count(site.component) if site.component in INDEXED else 0
            if not 0 <= site.index < count:
                there = f"0 to {count - 1}" if count else "none"
                raise InputError(f"site {site}: index {site.index} does not exist; there are {there}.")
        if site.component == "adapter":
            self._check_adapter(site)
        return site

    def _check_adapter(self, site: Site) -> None:
        found = self.adapters[site.layer]
        if site.module and site.module not in found:
            raise InputError(
                f"site {site}: layer {site.layer} has no adapter on {site.module!r}; "
                f"there are: {', '.join(found) or 'none'}."
            )
        if any(module.merged for module in found.values()):
            raise InputError(
                f"site {site}: the adapter is merged into the weights, so that it is no place of its own. "
                "Call unmerge_adapter() first."
            )

    def wide(self, site: Site) -> bool:
        """Whether later positions read what changes here in the same layer, through keys and values."""
        if site.component != "adapter" or not site.module:
            return site.component in WIDE
        own = self.layers[site.layer]
        module = self.adapters[site.layer][site.module]
        return not any(module is other for other in (own.query, own.output, *own.mlp.modules()))

    def span(self, site: Site) -> slice:
        """Columns of the component's values that belong to the site."""
        if site.component == "router" and site.index is not None:
            return slice(site.index, site.index + 1)
        if site.index is None or site.component not in ("head", "query", "key", "value"):
            return slice(None)
        size = self.shape.head_size
        return slice(site.index * size, (site.index + 1) * size)

    def _check_component(self, component: str) -> None:
        if not self._has(component):
            known = "this model has no" if component in COMPONENTS else "there is no"
            raise InputError(
                f"site: {known} component {component!r}; there are: {', '.join(self.components())}."
            )

    def _has(self, component: str) -> bool:
        first = self.layers[0]
        if component == "adapter":
            return any(self.adapters)
        needs = {
            "resid_mid": first.before_mlp,
            "attn_out": first.attention_end,
            "mlp_out": first.mlp_end,
            "head": first.output,
            "query": first.query,
            "key": first.key,
            "value": first.value,
            "router": first.experts,
            "expert": first.experts,
        }
        return component in COMPONENTS and needs.get(component, first) is not None
