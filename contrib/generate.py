"""Writes the manual page and the completions, from the parser and the templates next to them.

Type ``python -m contrib.generate`` after any change to the options, the metrics or a template, or
to the program in relay/xdp, which it compiles; that takes clang.
In a template ``@name@`` stands for what is known under that name here.
"""

import re
import sys
import textwrap
from argparse import Action, ArgumentParser
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Final

from prometheus_client.metrics_core import Metric

from contrib import program
from relay.assembly import MAX_CHANNELS
from relay.config.options import DEFAULT_FILE, OPTIONS, Option
from relay.config.parsing import MOST_SECRETS
from relay.config.reading import build_parser
from relay.daemon import CREDENTIAL_LIFETIME
from relay.net.listening import LISTEN_BUFFER
from relay.net.udp import PORT_BUFFER
from relay.observe.counters import PACKET_SIZES, Connections, Counters, InKernel, Relayed
from relay.observe.exposition import STUCK_AFTER, RelayCollector, Status
from relay.observe.logratelimit import BURST, BURST_OF_ALL, INTERVAL
from relay.probe.command import build_parser as build_probe_parser
from relay.turn import ratelimit
from relay.turn.auth import AuthFailure
from relay.turn.commands import Drop
from relay.turn.peers import NOT_PUBLIC
from relay.turn.users import DEFAULT_REALM
from relay.version import __version__

HERE: Final = Path(__file__).parent

_NOTHING: Final = [Relayed(0, 0)] * (len(PACKET_SIZES) + 1)
_OPTIONS: Final = {option.dest: option for option in OPTIONS}


def main() -> int:
    """Write the files, and say which of them are new or have changed."""
    for path, text in generated().items():
        if not path.exists() or path.read_text() != text:
            path.write_text(text)
            sys.stdout.write(f"{path}\n")
    for path in program.update():
        sys.stdout.write(f"{path}\n")
    return 0


def generated() -> dict[Path, str]:
    """Return what each file has to hold."""
    parser = build_parser()
    return {
        HERE / "man/firezone-relay.8": _manual_page(parser),
        HERE / "completion/firezone-relay.bash": _bash_completion(parser),
        HERE / "completion/_firezone-relay": _zsh_completion(parser),
    }


def _filled(template: str, values: Mapping[str, str]) -> str:
    text = (HERE / template).read_text()
    return re.sub("@([a-z0-9-]+)@", lambda match: values[match[1]], text)


def _groups(parser: ArgumentParser) -> Iterator[tuple[str, list[Action]]]:
    """Yield the groups of ``--help``, each with its options."""
    for group in parser._action_groups:  # noqa: SLF001 - argparse has no other way to ask
        if group._group_actions:  # noqa: SLF001
            yield group.title or "", group._group_actions  # noqa: SLF001


def _actions(parser: ArgumentParser) -> Iterator[Action]:
    for _, actions in _groups(parser):
        yield from actions


def _takes_value(action: Action) -> bool:
    return action.nargs != 0


def _help(action: Action) -> str:
    option = _OPTIONS.get(action.dest)
    return (action.help or "") if option is None else option.help


def choices(option: Option) -> tuple[str, ...]:
    """Return the words that an option takes, () if it takes others too.

    It names them when it is given another one: ``'': not one of human, json``.
    """
    try:
        option.parse("")
    except ValueError as error:
        named = re.search("not one of (.+)$", str(error))
        return tuple(named[1].split(", ")) if named else ()
    return ()


# --- The manual page, mdoc(7) ---------------------------------------------------------------


def _manual_page(parser: ArgumentParser) -> str:
    defaults = {f"default-{o.name}": o.default for o in OPTIONS if o.default is not None}
    values = defaults | {
        "version": __version__,
        "default-file": DEFAULT_FILE,
        "options": "\n".join(_option_lines(parser)),
        "probe-options": "\n".join(_probe_option_lines(build_probe_parser())),
        "longest-variable": max((option.variable for option in OPTIONS), key=len),
        "longest-kind": max(NOT_PUBLIC.values(), key=len),
        "variables": "\n".join(f".It Ev {o.variable}\n.Fl -{o.name}" for o in OPTIONS),
        "reloadable": _flag_list(option for option in OPTIONS if option.reloads),
        "restart": _flag_list(option for option in OPTIONS if not option.reloads),
        "metrics": "\n".join(_metric_lines()),
        "drop-reasons": _enumeration(reason.value for reason in Drop),
        "auth-failures": _enumeration(failure.value for failure in AuthFailure),
        "not-public": "\n".join(_prefix_lines()),
        "realm": DEFAULT_REALM,
        "most-secrets": str(MOST_SECRETS),
        "credential-hours": str(CREDENTIAL_LIFETIME // 3600),
        "max-channels": f"{MAX_CHANNELS:,}",
        "listen-buffer": str(LISTEN_BUFFER >> 20),
        "relay-buffer": str(PORT_BUFFER >> 10),
        "rate-burst": f"{ratelimit.BURST:g}",
        "client-rate": f"{ratelimit.CLIENT_RATE:g}",
        "client-burst": f"{ratelimit.CLIENT_BURST:g}",
        "stuck-after": f"{STUCK_AFTER:g}",
        "log-limit-burst": str(BURST),
        "log-limit-burst-of-all": str(BURST_OF_ALL),
        "log-limit-interval": f"{INTERVAL:g}",
    }
    return _filled("man/firezone-relay.8.in", values)


def _option_lines(parser: ArgumentParser) -> Iterator[str]:
    for title, actions in _groups(parser):
        yield f".Ss {_capitalized(title)}"
        yield ".Bl -tag -width Ds"
        for action in actions:
            value = f" Ar {action.metavar}" if _takes_value(action) else ""
            flags = [f"Fl {flag[1:]}{value}" for flag in action.option_strings]
            yield f".It {' , '.join(flags)}"
            yield from _description_lines(action)
        yield ".El"


def _probe_option_lines(parser: ArgumentParser) -> Iterator[str]:
    for action in _actions(parser):
        value = f" Ar {action.metavar}" if _takes_value(action) else ""
        flags = [f"Fl {flag[1:]}{value}" for flag in action.option_strings]
        yield f".It {' , '.join(flags) or f'Ar {action.metavar}'}"
        yield from _prose(_capitalized((action.help or "") % {"default": action.default}))


def _description_lines(action: Action) -> Iterator[str]:
    option = _OPTIONS.get(action.dest)
    text = _help(action)
    if option is None:
        yield from _prose(_capitalized(text))
        return
    if text.partition(" ")[0].rstrip(",") not in choices(option):
        text = _capitalized(text)
    if option.default is not None and _takes_value(action):
        text += f" (default: {option.default})"
    yield from _prose(text)
    if option.reloads:
        yield "Reloads."
    yield f".Bq Ev {option.variable}"


def _flag_list(options: Iterable[Option]) -> str:
    *lines, last = [f".Fl -{option.name}" for option in options]
    return "\n".join([*(f"{line} ," for line in lines), f"{last} ."])


def _metric_lines() -> Iterator[str]:
    quiet = Status(
        not_ready=None,
        stuck_for=0.0,
        loop_lag=0.0,
        slow_iterations=0,
        allocations=0,
        channels=0,
        permissions=0,
        portal_connected=True,
        portal_reconnects=0,
        responses={("method", "code"): 1},
        auth_failures={"reason": 0},
        refused_peers={"rule": 0},
        overflows=0,
        counters=Counters(["reason"]),
        in_kernel=InKernel({"device": "mode"}, 0, {"reason": 0}, _NOTHING, _NOTHING),
        connections=Connections({"transport": 0}, {"transport": 0}, {"reason": 0}, 0, 0.0),
    )
    collector = RelayCollector(lambda: quiet, version="")
    for metric in collector.collect():
        yield f".It {_signature(metric)}"
        yield from _prose(metric.documentation)


def _signature(metric: Metric) -> str:
    total = "_total" if metric.type == "counter" else ""
    labels = [label for label in metric.samples[0].labels if label != "le"]
    braces = f"{{{','.join(labels)}}}" if labels else ""
    return f"{metric.name}{total}{braces} ({metric.type})"


def _prefix_lines() -> Iterator[str]:
    kinds = defaultdict(list)
    for prefix, kind in NOT_PUBLIC.items():
        kinds[kind].append(prefix)
    for kind, prefixes in kinds.items():
        yield f".It {kind}"
        yield ", ".join(prefixes)


def _prose(text: str) -> Iterator[str]:
    """Yield text as lines of mdoc(7), one for each sentence."""
    for sentence in re.split(r"(?<=\.) ", text.removesuffix(".") + "."):
        yield re.sub(r"^(?=[.'])", r"\\&", _escaped(sentence))


def _escaped(text: str) -> str:
    """Keep the dashes of flags as they are typed: others become hyphens."""
    text = text.replace("\\", r"\e")
    return re.sub("--[a-z0-9-]+", lambda flag: flag[0].replace("-", r"\-"), text)


def _capitalized(text: str) -> str:
    return text[:1].upper() + text[1:]


def _enumeration(words: Iterable[str]) -> str:
    *most, last = [rf"\%{word}" for word in words]  # not to be hyphenated
    return f"{', '.join(most)} and {last}" if most else last


# --- Completion -----------------------------------------------------------------------------


def _bash_completion(parser: ArgumentParser) -> str:
    files, switches, cases = [], [], []
    for action in _actions(parser):
        option = _OPTIONS.get(action.dest)
        words = choices(option) if option else ()
        flags = " | ".join(action.option_strings)
        if action.metavar == "FILE":
            files.append(flags)
        elif words:
            cases.append(f"{flags}) words='{' '.join(words)}' ;;")
        elif not _takes_value(action):
            switches.append(flags)
    everything = " ".join(flag for action in _actions(parser) for flag in action.option_strings)
    probing = " ".join(
        flag for action in _actions(build_probe_parser()) for flag in action.option_strings
    )
    values = {
        "probe-flags": "\n            ".join(textwrap.wrap(probing, 84, break_on_hyphens=False)),
        "files": " | ".join(files),
        "choices": "\n        ".join(cases),
        "switches": " | \\\n        ".join(switches),
        "flags": "\n            ".join(textwrap.wrap(everything, 84, break_on_hyphens=False)),
    }
    return _filled("completion/bash.in", values)


def _zsh_completion(parser: ArgumentParser) -> str:
    specs = [_zsh_spec(action) for action in _actions(parser)]
    probing = [
        _zsh_spec(action, {}) for action in _actions(build_probe_parser()) if action.option_strings
    ]
    values = {
        "specs": " \\\n".join(f"    {spec}" for spec in specs),
        "probe-specs": " \\\n".join(f"        {spec}" for spec in probing),
    }
    return _filled("completion/zsh.in", values)


def _zsh_spec(action: Action, known: Mapping[str, Option] = _OPTIONS) -> str:
    """Describe one option to _arguments: zshcompsys(1). Of those *known* the relay has more."""
    option = known.get(action.dest)
    text = (action.help or "") if option is None else option.help
    flags = action.option_strings
    excluded = " ".join(flags)
    if action.dest in {"help", "version"}:
        excluded = "- *"
    summary = re.sub(r"([\]\[:\\])", r"\\\1", re.split(r"; | \((?:default|%)|\. ", text)[0])
    tail = f"[{summary}]"
    if _takes_value(action):
        flags = [f"{flag}=" if flag.startswith("--") else f"{flag}+" for flag in flags]
        tail += f":{action.metavar}:{_zsh_values(action, option)}"
    if option is not None and option.repeatable:
        return _quoted(f"*{flags[0]}{tail}")
    if len(flags) > 1:
        return f"{_quoted(f'({excluded})')}{{{','.join(flags)}}}{_quoted(tail)}"
    return _quoted(f"({excluded}){flags[0]}{tail}")


def _zsh_values(action: Action, option: Option | None) -> str:
    words = " ".join(choices(option)) if option else ""
    match action.metavar:
        case "FILE":
            return "_files"
        case "LEVELS":  # a list, some of it by logger
            return f"{{compset -P '*[,=]'; compadd - {words}}}"
        case _:
            return f"({words})" if words else " "


def _quoted(text: str) -> str:
    return "'" + text.replace("'", r"'\''") + "'"


if __name__ == "__main__":
    sys.exit(main())
