"""Sites of the network: what can be read and changed, in which layers, with which indices.

In: a model. Out: `Site`s that exist in it, as a forward pass shows. A site names no position; an edit does.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from safetynet.errors import InputError
from safetynet.models.blocks import decoder_layers
from safetynet.models.causal_lm import CausalLM
from safetynet.models.parts import Parts, Shape, adapters, parts, shape
from safetynet.models.support import check_model
from safetynet.vocabulary import COMPONENTS

MODULES: dict[str, Callable[[Parts], Any]] = {
    "query": lambda parts: parts.query,
    "key": lambda parts: parts.key,
    "value": lambda parts: parts.value,
    "attention": lambda parts: parts.attention,
    "head": lambda parts: parts.output,
    "attn_out": lambda parts: parts.attention_end,
    "resid_mid": lambda parts: parts.before_mlp,
    "router": lambda parts: parts.experts,
    "expert": lambda parts: parts.experts,
    "mlp_out": lambda parts: parts.mlp_end,
}
"""The module at which a component is reached, where it is not the layer itself."""
NONLOCAL = ("embedding", "resid_pre", "key", "value", "adapter")
"""Components that later positions of the same layer read."""
INDEXED = ("head", "query", "key", "value", "attention", "router", "expert")


@dataclass(frozen=True, order=True)
class Site:
    """One site of the network.

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
class CheckedSites:
    """What a forward pass has shown of a model's sites; `sitecheck` makes it."""

    absent: Mapping[tuple[str, int], str]
    """Why a component is no site of a layer."""
    head_sizes: Mapping[tuple[str, int], tuple[int, int]]
    """How many heads a component has in a layer, and the columns of each."""
    plain_attention: frozenset[int]
    """Layers whose attention returns what its output projection gives, and nothing besides."""
    pointwise: bool
    """Whether layers can be called for columns that do not follow each other."""
    not_resumable: str
    """Why layers cannot be called for some columns at all; "" where they can."""


@dataclass(frozen=True)
class Architecture:
    """A model's layers, sizes and sites, looked up once."""

    model: Any
    layers: tuple[Parts, ...]
    shape: Shape

    @classmethod
    def of(cls, model: CausalLM) -> "Architecture":
        """Look a model up; errors as in `decoder_layers`."""
        return cls(model, tuple(parts(layer) for layer in decoder_layers(model)), shape(model))

    @cached_property
    def checked(self) -> CheckedSites:
        """What the live check has shown; one short forward pass for each model.

        Raises:
            InputError: if the model has no residual stream that its layers pass on.
        """
        from safetynet.engine.sitecheck import check_sites

        return check_sites(self)

    @cached_property
    def adapters(self) -> tuple[dict[str, Any], ...]:
        """For each layer its LoRA modules by path; looked up once, since every check of a site asks."""
        return tuple(adapters(parts.layer) for parts in self.layers)

    def components(self) -> list[str]:
        """Components that this model has in at least one layer; errors as in `checked`."""
        return [component for component in COMPONENTS if self.layers_with(component)]

    def layers_with(self, component: str) -> list[int]:
        """Layers in which a component is a site."""
        return self._layers_with[component]

    @cached_property
    def _layers_with(self) -> dict[str, list[int]]:
        depth, absent = range(self.shape.layers), self.checked.absent
        layers = {name: [i for i in depth if (name, i) not in absent] for name in COMPONENTS}
        layers["embedding"] = layers["embedding"][:1]
        layers["adapter"] = [] if self._adapters_refused else [i for i in depth if self.adapters[i]]
        return layers

    @cached_property
    def _adapters_refused(self) -> str:
        """Why the updates of this model's adapter are no sites; "" where they are."""
        try:
            check_model(self.model, "adapter sites")
        except InputError as error:
            return str(error).removesuffix(".")
        from transformers.pytorch_utils import Conv1D

        for layer_parts, modules in zip(self.layers, self.adapters, strict=True):
            experts = layer_parts.experts
            experts = experts.get_base_layer() if hasattr(experts, "get_base_layer") else experts
            for name, module in modules.items():
                updated = module.get_base_layer()
                if updated is not experts and not isinstance(updated, torch.nn.Linear | Conv1D):
                    return f"the update of {name} is added to no states, since its module returns none"
        return ""

    def why_absent(self, component: str) -> str:
        """Why a component is no site of any layer, or of some; "" where it is one of all."""
        if component == "adapter":
            absent = self._adapters_refused or "no module of its layers has a LoRA adapter"
            return "" if self.layers_with(component) else absent
        reasons: dict[str, list[int]] = {}
        for layer in range(self.shape.layers):
            if why := self.checked.absent.get((component, layer)):
                reasons.setdefault(why, []).append(layer)
        if len(reasons) < 2:
            return next(iter(reasons), "")
        return "; ".join(f"{why} (layers {', '.join(map(str, layers))})" for why, layers in reasons.items())

    def sites(self, component: str) -> list[Site]:
        """Every site of one component, layer by layer; heads and experts one by one.

        Raises:
            InputError: if this model has no such component.
        """
        self._check_component(component)
        layers = self.layers_with(component)
        if component == "adapter":
            return [Site(component, i, module=name) for i in layers for name in self.adapters[i]]
        if component in INDEXED:
            return [Site(component, i, index) for i in layers for index in range(self.count(component, i))]
        return [Site(component, i) for i in layers]

    def count(self, component: str, layer: int = 0) -> int:
        """How many heads or experts a layer has."""
        if component in ("router", "expert"):
            return self.shape.experts
        return self.checked.head_sizes[component, layer][0]

    def check(self, site: Site) -> Site:
        """The site itself.

        Raises:
            InputError: if it does not exist here; the message says what does, or why.
        """
        self._check_component(site.component)
        last = 0 if site.component == "embedding" else self.shape.layers - 1
        if not 0 <= site.layer <= last:
            raise InputError(f"site {site}: layer {site.layer} does not exist; there are 0 to {last}.")
        if site.component == "adapter":
            modules = self.adapters[site.layer]
            if site.module and site.module not in modules:
                raise InputError(
                    f"site {site}: layer {site.layer} has no adapter on {site.module!r}; "
                    f"there are: {', '.join(modules) or 'none'}."
                )
            if any(module.merged for module in modules.values()):
                raise InputError(
                    f"site {site}: the adapter is merged into the weights, so that it is no site of its own. "
                    "Call unmerge_adapter() first."
                )
        elif why := self.checked.absent.get((site.component, site.layer)):
            layers = ", ".join(map(str, self.layers_with(site.component)))
            raise InputError(f"site {site}: {why}. Layers that have {site.component}: {layers}.")
        if site.index is not None:
            count = self.count(site.component, site.layer) if site.component in INDEXED else 0
            if not 0 <= site.index < count:
                there = f"0 to {count - 1}" if count else "none"
                raise InputError(f"site {site}: index {site.index} does not exist; there are {there}.")
        return site

    def is_local(self, site: Site) -> bool:
        """Whether no later position reads, in the same layer, what changes here: through keys and values."""
        if not self.checked.pointwise:
            return False
        if site.component != "adapter" or not site.module:
            return site.component not in NONLOCAL
        layer_parts = self.layers[site.layer]
        module = self.adapters[site.layer][site.module]
        # Of attention, a query's change stays with its token, and so does what leaves the heads.
        if module is layer_parts.query or module is layer_parts.output:
            return True
        attention = layer_parts.attention
        return attention is not None and all(module is not inside for inside in attention.modules())

    def span(self, site: Site) -> slice:
        """Columns of the component's values that belong to the site."""
        if site.component == "router" and site.index is not None:
            return slice(site.index, site.index + 1)
        if site.index is None or site.component not in ("head", "query", "key", "value"):
            return slice(None)
        size = self.checked.head_sizes[site.component, site.layer][1]
        return slice(site.index * size, (site.index + 1) * size)

    def _check_component(self, component: str) -> None:
        if component not in COMPONENTS:
            there = ", ".join(self.components())
            raise InputError(f"site: there is no component {component!r}; there are: {there}.")
        if not self.layers_with(component):
            there, why = ", ".join(self.components()), self.why_absent(component)
            raise InputError(
                f"site: this model has no component {component!r}; there are: {there}. "
                f"{why[0].upper()}{why[1:]}."
            )
