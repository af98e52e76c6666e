"""Every setting of the cluster, declared once; `python -m shared.settings` prints docs/settings.md.

A process reads its settings once, at its start, from `RTS_<NAME>` in the environment and from
`--<name>` flags, which win. An unknown name or a bad value stops the start.
"""

from __future__ import annotations

import dataclasses
import difflib
import ipaddress
import math
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from shared.redis_url import check_redis_url

ENV_PREFIX = "RTS_"
DEMO_MODEL = "smollm2-135m"

_GATEWAY = ("gateway",)
_WORKER = ("worker",)
_UP = ("up",)
_BOTH = ("gateway", "worker")
_ALL = ("up", "gateway", "worker", "control")
_BOOLEANS = {
    **dict.fromkeys(("1", "true", "yes", "on"), True),
    **dict.fromkeys(("0", "false", "no", "off"), False),
}
_ENGINE_PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*", re.ASCII)
_MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,127}", re.ASCII)
_ORIGIN = re.compile(r"https?://[A-Za-z0-9.\-\[\]:]+", re.ASCII)

T = TypeVar("T")


class SettingsError(Exception):
    """A setting is unknown or has a bad value; the message names the key and the value."""


@dataclass(frozen=True, slots=True)
class ModelSource:
    """One served model: the name that requests use, and where its files come from.

    Attributes:
        name: the served name.
        source: a hub id, a folder or a GGUF file; an engine without files ignores it.
        is_demo: `source` is the demo model's folder, which is fetched when it is missing.
    """

    name: str
    source: str
    is_demo: bool = False


def _setting(
    default: T,
    help_text: str,
    roles: tuple[str, ...],
    *,
    low: float | None = None,
    high: float | None = None,
    choices: tuple[str, ...] = (),
    secret: bool = False,
) -> T:
    metadata = {"help": help_text, "roles": roles, "low": low, "high": high, "choices": choices}
    return dataclasses.field(default=default, metadata=metadata, repr=not secret)


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The settings of one process; each field's help text is in its declaration."""

    redis_url: str = _setting(
        "",
        "Redis or Valkey >= 7.0: redis://, rediss://, unix:// or sentinel:// (docs/redis.md); "
        "empty = `up` starts one",
        _ALL,
        secret=True,
    )
    host: str = _setting(
        "127.0.0.1",
        "address to listen on; beyond loopback only with RTS_ALLOW_ANONYMOUS=1",
        _GATEWAY,
    )
    port: int = _setting(8000, "TCP port of the first gateway", _GATEWAY, low=1, high=65535)
    workers: int = _setting(1, "worker processes `up` starts for each model", _UP, low=0, high=256)
    gateways: int = _setting(
        1, "gateways `up` starts, on ports from RTS_PORT up", _UP, low=1, high=64
    )
    model: str = _setting(
        "",
        "hub id, folder or GGUF file, or name=source; comma-separated for several; "
        "empty = the demo model",
        ("up", "worker"),
    )
    engine: str = _setting(
        "torch",
        "torch, echo (deterministic, no model), vllm or package.module:Class",
        ("up", "worker"),
    )
    echo_step_ms: float = _setting(
        10.0, "time of one step of the echo engine, in ms", _WORKER, low=0, high=60_000
    )
    dtype: str = _setting(
        "auto",
        "number format of weights and cache; auto is bfloat16 where that is fast",
        _WORKER,
        choices=("auto", "bfloat16", "float32"),
    )
    backend: str = _setting(
        "auto",
        "what computes the torch engine's models: cpu = compiled code (x86-64, a C++ compiler at "
        "the first start), reference = transformers' modules, auto = the first that can",
        _WORKER,
        choices=("auto", "cpu", "reference"),
    )
    deterministic: bool = _setting(
        False,
        "a request's tokens are the same alone and in any batch; needs the cpu backend",
        _WORKER,
    )
    max_batch_size: int = _setting(
        32, "most sequences in one step of the engine", _WORKER, low=1, high=256
    )
    max_wait_ms: float = _setting(
        5.0, "longest wait of an idle engine to fill a batch, in ms", _WORKER, low=0, high=100
    )
    kv_cache_mb: int = _setting(
        0,
        "memory for the KV cache, in MiB; 0 = on a CPU as much as the weights, but 512 to 4096, "
        "or one context if that is more, at most 30 % of the free memory; on a GPU 70 % of it. A "
        "small one shortens the context",
        _WORKER,
        low=0,
        high=2**24,
    )
    threads: int = _setting(
        0,
        "CPU threads of the engine; 0 = one for each core that it may use",
        _WORKER,
        low=0,
        high=1024,
    )
    prefix_cache: bool = _setting(
        True,
        "requests share the KV cache of what their beginnings have in common, across callers: how "
        "soon a first token comes can tell that somebody sent the same beginning before",
        _WORKER,
    )
    queue_limit: int = _setting(
        1000,
        "most requests waiting for one model in one priority",
        _GATEWAY,
        low=1,
        high=10_000_000,
    )
    queue_bytes: int = _setting(
        268_435_456,
        "most bytes waiting for one model in one priority",
        _GATEWAY,
        low=65_536,
        high=2**40,
    )
    strict: bool = _setting(
        False,
        "accept a request only once a replica has it, and none without a replica (docs/redis.md)",
        _GATEWAY,
    )
    max_connections: int = _setting(
        2000, "most open client connections of one gateway", _GATEWAY, low=1, high=1_000_000
    )
    max_body_bytes: int = _setting(
        1_048_576, "longest request body, in bytes", _GATEWAY, low=1024, high=4_194_304
    )
    data_dir: Path = _setting(  # noqa: RUF009 (a field, not a shared value)
        Path("~/.cache/realtime-serve"),
        "folder for models and for the server's data",
        ("up", "worker"),
    )
    heartbeat_file: str = _setting(
        "",
        "file that control touches while it looks for jobs, for probes; each process has its own",
        ("control",),
    )
    log_format: str = _setting(
        "auto",
        "auto = console on a terminal, else json",
        _ALL,
        choices=("auto", "json", "console"),
    )
    log_level: str = _setting(
        "info", "lowest level that is logged", _ALL, choices=("debug", "info", "warning", "error")
    )
    aging_s: float = _setting(
        30.0,
        "a request that waited this long counts one priority higher, in s",
        _WORKER,
        low=0.1,
        high=86_400,
    )
    lease_ms: int = _setting(
        3000,
        "an engine with requests and no progress for this long is dead, in ms",
        _WORKER,
        low=200,
        high=60_000,
    )
    engine_iteration_timeout_s: float = _setting(
        60.0,
        "a step of the engine that takes longer is a hang: the worker ends, in s; 0 never",
        _WORKER,
        low=0,
        high=86_400,
    )
    timeout_s: float = _setting(
        600.0, "default and longest deadline of a request, in s", _GATEWAY, low=0.1, high=86_400
    )
    default_max_tokens: int = _setting(
        256, "max_tokens of a request that names none", _GATEWAY, low=1, high=1_000_000
    )
    generation_config: str = _setting(
        "auto",
        "temperature, top_p, top_k, min_p and repetition_penalty of a request that names none: "
        "auto = as the model's generation_config.json advises, else OpenAI's; openai = OpenAI's",
        _GATEWAY,
        choices=("auto", "openai"),
    )
    requests_per_minute: int = _setting(
        0,
        "requests a minute for each caller; 0 = no limit. Without API keys a caller is "
        "the client_id that it names: against accidents, not against malice",
        _GATEWAY,
        low=0,
        high=10_000_000,
    )
    tokens_per_minute: int = _setting(
        0,
        "prompt + max_tokens a minute for each caller; 0 = no limit. Without API keys a caller is "
        "the client_id that it names: against accidents, not against malice",
        _GATEWAY,
        low=0,
        high=1_000_000_000,
    )
    cors_origins: str = _setting(
        "", "origins that browsers may call from, comma-separated; * = any", _GATEWAY
    )
    trusted_proxies: str = _setting(
        "",
        "addresses or networks whose X-Forwarded-For is believed, comma-separated",
        _GATEWAY,
    )
    allow_anonymous: bool = _setting(
        False, "listen beyond loopback although there are no API keys", _GATEWAY
    )
    keep_alive_s: float = _setting(
        15.0, "a silent stream gets a comment line this often, in s", _GATEWAY, low=0.05, high=300
    )
    stream_idle_s: float = _setting(
        120.0,
        "longest time a live worker gives nothing of a stream, then it ends in an error, in s",
        _GATEWAY,
        low=0.1,
        high=86_400,
    )
    slow_client_s: float = _setting(
        30.0, "a client that reads nothing for this long is cut, in s", _GATEWAY, low=0.1, high=3600
    )
    slow_client_events: int = _setting(
        1024, "most unsent events of one stream, then it is cut", _GATEWAY, low=16, high=1_000_000
    )
    drain_grace_s: float = _setting(
        30.0, "time that SIGTERM leaves to running streams, in s", _BOTH, low=0, high=3600
    )
    drain_delay_s: float = _setting(
        0.0,
        "time after SIGTERM that a gateway is not ready and still serves, in s: longer than a load "
        "balancer takes to notice",
        _GATEWAY,
        low=0,
        high=3600,
    )
    retention_s: float = _setting(
        30.0, "a finished stream can be read this long, in s", _GATEWAY, low=1, high=86_400
    )
    resumable_retention_s: float = _setting(
        300.0, "the same for a resumable stream, in s", _GATEWAY, low=1, high=86_400
    )
    max_grace_s: float = _setting(
        3600.0,
        "longest time a resumable request outlives its connection, in s",
        _GATEWAY,
        low=0,
        high=86_400,
    )

    def __post_init__(self) -> None:
        """Check every value, also of an object that was built in code.

        Raises:
            SettingsError: a value is out of its range or does not fit another one.
        """
        for spec in dataclasses.fields(self):
            value = getattr(self, spec.name)
            _check_value(spec, value, f"{env_name(spec.name)}={value}")
        object.__setattr__(self, "data_dir", _absolute(self.data_dir))
        if self.port + self.gateways - 1 > 65535:
            raise SettingsError(
                f"RTS_GATEWAYS={self.gateways}: the ports from RTS_PORT={self.port} up end at 65535"
            )
        if not self.allow_anonymous and not _is_loopback(self.host):
            raise SettingsError(
                f"RTS_HOST={self.host}: without API keys this would be open to everyone who can "
                "reach it; set RTS_ALLOW_ANONYMOUS=1 if that is meant"
            )
        self.models()

    @classmethod
    def load(cls, env: Mapping[str, str], flags: Mapping[str, str] | None = None) -> Settings:
        """Read the settings of this process.

        Args:
            env: the environment; only names that start with RTS_ count, and an empty value means
                the default.
            flags: texts of flags by their names without the dashes in front ("max-wait-ms"); they
                win over the environment.

        Raises:
            SettingsError: an unknown name or a bad value.
        """
        specs = {spec.name: spec for spec in dataclasses.fields(cls)}
        values: dict[str, Any] = {}
        for key, text in sorted(env.items()):
            if not key.startswith(ENV_PREFIX):
                continue
            spec = specs.get(key.removeprefix(ENV_PREFIX).lower())
            if spec is None or key != env_name(spec.name):
                raise _unknown("environment variable", key, text, map(env_name, specs))
            if text:
                values[spec.name] = _parse(spec, text, key)
        for flag, text in (flags or {}).items():
            spec = specs.get(flag.replace("-", "_"))
            if spec is None or f"--{flag}" != flag_name(spec.name):
                raise _unknown("flag", f"--{flag}", text, map(flag_name, specs))
            values[spec.name] = _parse(spec, text, f"--{flag}")
        return cls(**values)

    def to_env(self) -> dict[str, str]:
        """The variables that give a child process these settings; defaults are left out."""
        changed = {}
        for spec in dataclasses.fields(self):
            value = getattr(self, spec.name)
            if value != spec.default:
                changed[env_name(spec.name)] = str(int(value) if spec.type == "bool" else value)
        return changed

    def models(self) -> tuple[ModelSource, ...]:
        """The models of RTS_MODEL in its order; without it, the one that the engine brings.

        Raises:
            SettingsError: a name is malformed or given twice.
        """
        if not self.model:
            if self.engine in ("torch", "vllm"):
                folder = str(self.data_dir / "models" / DEMO_MODEL)
                return (ModelSource(DEMO_MODEL, folder, is_demo=True),)
            name = self.engine.rpartition(":")[2].lower()
            return (ModelSource(name, name),)
        found: dict[str, ModelSource] = {}
        for item in self.model.split(","):
            name, equals, source = (part.strip() for part in item.partition("="))
            if not equals:
                name, source = _served_name(name), name
            if not _MODEL_NAME.fullmatch(name) or not source:
                raise SettingsError(
                    f"RTS_MODEL={self.model}: {item!r} is not a source or name=source"
                )
            if name in found:
                raise SettingsError(f"RTS_MODEL={self.model}: two models are called {name!r}")
            found[name] = ModelSource(name, _expanded(source))
        return tuple(found.values())


def env_name(field_name: str) -> str:
    """The environment variable of a field."""
    return ENV_PREFIX + field_name.upper()


def flag_name(field_name: str) -> str:
    """The command line flag of a field."""
    return "--" + field_name.replace("_", "-")


def allowed_values(spec: dataclasses.Field[Any]) -> str:
    """The values that a setting takes, in words."""
    choices, low, high = (spec.metadata[key] for key in ("choices", "low", "high"))
    if choices:
        return "one of " + ", ".join(choices)
    if spec.type == "bool":
        return "1 or 0"
    if low is not None:
        kind = "a whole number" if spec.type == "int" else "a number"
        return f"{kind} from {low} to {high}"
    return {"engine": "torch, echo, vllm or package.module:Class"}.get(spec.name, "text")


def _parse(spec: dataclasses.Field[Any], text: str, shown: str) -> Any:
    text = text.strip()
    value: Any = text
    if spec.type == "int":
        value = int(text) if re.fullmatch(r"[+-]?[0-9]{1,20}", text) else None
    elif spec.type == "float":
        number = r"[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]{1,3})?"
        value = float(text) if re.fullmatch(number, text) else None
    elif spec.type == "bool":
        value = _BOOLEANS.get(text.lower())
    elif spec.type == "Path":
        value = Path(text)
    if value is None:
        raise SettingsError(f"{shown}={text}: must be {allowed_values(spec)}")
    _check_value(spec, value, f"{shown}={text}")
    return value


def _check_value(spec: dataclasses.Field[Any], value: Any, shown: str) -> None:
    choices, low, high = (spec.metadata[key] for key in ("choices", "low", "high"))
    good = True
    if choices:
        good = value in choices
    elif low is not None:
        good = math.isfinite(value) and low <= value <= high
    elif spec.name == "engine":
        good = value in ("torch", "echo", "vllm") or bool(_ENGINE_PATH.fullmatch(value))
    if not good:
        raise SettingsError(f"{shown}: must be {allowed_values(spec)}")
    if spec.name == "redis_url" and value:
        try:
            check_redis_url(value)
        except ValueError as error:
            raise SettingsError(f"{shown.partition('=')[0]}: {error}") from None
    elif spec.name == "trusted_proxies":
        for item in filter(None, (part.strip() for part in value.split(","))):
            try:
                ipaddress.ip_network(item, strict=False)
            except ValueError:
                raise SettingsError(f"{shown}: {item!r} is no address or network") from None
    elif spec.name == "cors_origins":
        for item in filter(None, (part.strip() for part in value.split(","))):
            if item != "*" and not _ORIGIN.fullmatch(item):
                raise SettingsError(f"{shown}: {item!r} is no origin like https://site.org")


def _absolute(path: Path) -> Path:
    try:
        return path.expanduser().absolute()
    except RuntimeError as error:
        raise SettingsError(f"{path}: {error}") from error


def _expanded(source: str) -> str:
    return str(_absolute(Path(source))) if source.startswith("~") else source


def _served_name(source: str) -> str:
    """A hub id is its own name; a folder is called as its last part, a file without its suffix."""
    if source.startswith(("/", "./", "../", "~")) or source.lower().endswith(".gguf"):
        path = Path(source)
        return path.stem if path.suffix.lower() == ".gguf" else path.resolve().name
    return source


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _unknown(kind: str, shown: str, text: str, known: Iterable[str]) -> SettingsError:
    near = difflib.get_close_matches(shown, list(known), n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    # Half of a misspelt secret's name may still tell that it is one.
    if re.search("token|url|key|secret|pass", "".join((shown, *near)), re.IGNORECASE):
        text = "***"
    return SettingsError(f"{shown}={text}: unknown {kind}{hint}")


def _page() -> str:
    """The text of docs/settings.md."""
    lines = [
        "# Settings",
        "",
        "Generated by `python -m shared.settings > docs/settings.md`; do not edit.",
        "",
        "Read once at the start of a process. Flags win over the environment; an empty variable",
        "means the default; an unknown name or a bad value stops the start.",
        "",
        "| Variable, flag | Default | Values | Read by | Meaning |",
        "|---|---|---|---|---|",
    ]
    for spec in dataclasses.fields(Settings):
        default: Any = spec.default
        shown = f"`{int(default) if spec.type == 'bool' else default}`"
        row = (
            f"`{env_name(spec.name)}` `{flag_name(spec.name)}`",
            shown if default != "" else "empty",
            allowed_values(spec),
            ", ".join(spec.metadata["roles"]),
            spec.metadata["help"],
        )
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.stdout.write(_page())
