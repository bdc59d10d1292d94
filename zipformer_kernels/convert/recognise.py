"""Which class of ours a module can become: by what its methods do, then by what it holds."""

from __future__ import annotations

from collections.abc import Collection

from torch import nn

from zipformer_kernels.convert.digest import Digests
from zipformer_kernels.convert.known import KNOWN, Version
from zipformer_kernels.convert.rows import ROWS, attributes, listed
from zipformer_kernels.convert.swap import Match
from zipformer_kernels.convert.trial import Trials
from zipformer_kernels.core.module import Module

# Names under which upstream's classes are found beside our own.
ALIASES = {
    "Zipformer2": "Zipformer",
    "Zipformer2Encoder": "ZipformerEncoder",
    "DownsampledZipformer2Encoder": "DownsampledZipformerEncoder",
    "Zipformer2EncoderLayer": "ZipformerEncoderLayer",
}


def recognise(module: nn.Module, trust: Collection[str | type], digests: Digests, trials: Trials) -> Match | None:
    """The row of a module, or None for one that is ours already or has nothing to do with upstream.

    Args:
        module: any module.
        trust: classes, or their names, that do what upstream's class of their name or with their attributes does.
        digests, trials: of the classes that were looked at before.
    """
    if isinstance(module, Module) or type(module).__module__.partition(".")[0] == "torch":
        return None
    named, alike = _looks_like(module)
    looks = named or alike
    if not looks:
        return None
    patched = ROWS[looks[0]].patched(module)
    if patched:
        return Match(looks[0], patched)
    found = digests.of(module)
    reasons = []
    for name in KNOWN:
        versions = _versions(name, found)
        if versions is not None:
            settings = {key: value for version in versions for key, value in version.settings.items()}
            reason = next((r for version in versions if (r := version.refuses(module)) is not None), None)
            reason = reason or ROWS[name].mismatch(module)
            if reason is None:
                return Match(name, None, settings)
            reasons.append(Match(name, reason))
    if reasons:
        return reasons[0]
    name = looks[0]
    if type(module) in trust or type(module).__name__ in trust:
        return Match(name, ROWS[name].mismatch(module))
    if None in found.values():
        return _by_trial(module, [*dict.fromkeys(named + alike)], found, trials)
    return Match(name, _unknown(module, name, found))


def _by_trial(module: nn.Module, looks: list[str], found: dict[str, str | None], trials: Trials) -> Match:
    """What a module is whose source cannot be had in part: what does the same on small inputs."""
    reasons = []
    for name in looks:
        known = KNOWN[name]
        if any(d not in known.get(method, ()) for method, d in found.items() if d is not None or method not in known):
            reasons.append(
                _unknown(module, name, {method: d for method, d in found.items() if d or method not in known})
            )
            continue
        for version in dict.fromkeys(known.get("forward", {"": Version()}).values()):
            match = Match(name, None, version.settings)
            reason = version.refuses(module) or match.row.mismatch(module) or trials.reason(module, match)
            if reason is None:
                return match
            reasons.append(f"its source cannot be had, and {reason}")
    return Match(looks[0], reasons[0])


def _looks_like(module: nn.Module) -> tuple[list[str], list[str]]:
    """The rows whose name the class or one of its bases bears, and those whose attributes the module has."""
    names = [ALIASES.get(base.__name__, base.__name__) for base in type(module).__mro__]
    held = attributes(module)
    alike = [name for name, row in ROWS.items() if len(row.attributes) > 2 and row.attributes - row.adds.keys() <= held]
    alike.sort(key=lambda name: -len(ROWS[name].attributes))
    return [name for name in names if name in ROWS], alike


def _versions(name: str, found: dict[str, str | None]) -> list[Version] | None:
    """The versions of the methods that were found, or None where one of them is none of this class."""
    known = KNOWN[name]
    main = next(iter(known)) if "forward" not in known else "forward"
    if main not in found or any(digest not in known.get(method, ()) for method, digest in found.items()):
        return None
    versions = [known[method][digest] for method, digest in found.items()]
    return versions if all(need in found for version in versions for need in version.needs) else None


def _unknown(module: nn.Module, name: str, found: dict[str, str | None]) -> str:
    known, cls = KNOWN[name], type(module).__name__
    odd = [method for method, digest in found.items() if digest not in known.get(method, ())]
    new = [method for method in odd if method not in known]
    changed = [method for method in odd if method in known]
    if new and not changed:
        return f"it has {listed(new)}, which ours has not"
    what = listed(changed) or "forward"
    return f"its {what} is none of the known versions of {name}; if it does the same, pass trust=[{cls!r}]"
