"""The bill of materials of a bundle, as CycloneDX JSON: for a security office, and for scanners.

Its facts are the lock's; that the bundle's bytes are those is what `envbuilder bundle verify` proves. No
host and no time of day is in it, so one bundle has one bill, whoever writes it.
"""

from __future__ import annotations

import hashlib
import json
from uuid import UUID

from cyclonedx.model.bom import Bom, BomMetaData
from cyclonedx.model.component import Component, ComponentScope
from cyclonedx.model.tool import ToolRepository
from cyclonedx.output import make_outputter
from cyclonedx.schema import OutputFormat, SchemaVersion

from envbuilder.bundle import RECIPE
from envbuilder.bundles.components import (
    environment_component,
    model_component,
    own_component,
    package_component,
)
from envbuilder.bundles.dependencies import dependency_graph, own_wheels
from envbuilder.lock import GROUPS, Group
from envbuilder.model import Bundle
from envbuilder.recipe import load_recipe
from envbuilder.target import Target, target_for

_SCHEMA = SchemaVersion.V1_6
"""One before the newest: scanners read it."""


def bill_of_materials(bundle: Bundle) -> str:
    """The bill of materials of `bundle`: JSON of CycloneDX 1.6 (ECMA-424).

    Scope `required` is what the environment holds, `excluded` what only builds it or runs envbuilder. The
    dependency graph is that at run time, from the wheels' metadata and the lock. IntegrityError where a
    wheel can't be read or a patch was changed, InputError where the bundle's recipe can't be read.
    """
    recipe = load_recipe(bundle.path / RECIPE)
    target = target_for(bundle.lock.target, bundle.record.python)
    own = own_wheels(bundle)
    groups = _groups(bundle, target)
    packages = [
        (file, package_component(bundle, file, groups[file.package, file.version]))
        for file in bundle.lock.select(target, GROUPS)
    ]
    # The tool may have another version of a package: the env's, which comes first, is in the graph.
    components = {file.package: component for file, component in reversed(packages)}
    tool, *trainer = own
    components[tool.name] = own_component(tool, ComponentScope.EXCLUDED)
    components |= {wheel.name: own_component(wheel, ComponentScope.REQUIRED) for wheel in trainer}
    in_graph = {id(component) for component in components.values()}
    others = [component for _, component in packages if id(component) not in in_graph]
    models = [model_component(bundle, model) for model in bundle.lock.models]
    root = environment_component(bundle, recipe)

    bom = Bom(
        components=[*others, *components.values(), *models],
        serial_number=_serial(bundle),
        metadata=BomMetaData(
            component=root, tools=ToolRepository(components=[Component(name=tool.name, version=tool.version)])
        ),
    )
    graph = dependency_graph(bundle, target, own, recipe.requirements)
    roots = graph.pop("") | {wheel.name for wheel in own}
    bom.register_dependency(root, [*(components[name] for name in sorted(roots)), *models])
    for name, needed in sorted(graph.items()):
        bom.register_dependency(components[name], [components[other] for other in sorted(needed)])
    return _text(bom)


def _groups(bundle: Bundle, target: Target) -> dict[tuple[str, str], list[Group]]:
    """Package and version → the groups that need it on `target`."""
    groups: dict[tuple[str, str], list[Group]] = {}
    for group in GROUPS:
        for file in bundle.lock.select(target, (group,)):
            groups.setdefault((file.package, file.version), []).append(group)
    return groups


def _serial(bundle: Bundle) -> UUID:
    """From the record, which names the lock by its hash: the same for the same bundle."""
    return UUID(bytes=hashlib.sha256(bundle.record.model_dump_json().encode()).digest()[:16], version=5)


def _text(bom: Bom) -> str:
    table = json.loads(make_outputter(bom, OutputFormat.JSON, _SCHEMA).output_as_string())
    del table["metadata"]["timestamp"]  # the library has no way to leave it out
    return json.dumps(table, indent=2, sort_keys=True) + "\n"
