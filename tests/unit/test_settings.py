"""Settings: names, types, ranges, and what the messages say."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from shared.redis_url import SentinelUrl, parse_sentinel
from shared.settings import (
    DEMO_MODEL,
    ModelSource,
    Settings,
    SettingsError,
    allowed_values,
    env_name,
    flag_name,
)

ROOT = Path(__file__).parents[2]
FIELDS = dataclasses.fields(Settings)


def test_defaults_without_anything_set() -> None:
    settings = Settings.load({"PATH": "/bin", "RTSX": "no"})
    assert settings == Settings()
    assert (settings.host, settings.port, settings.max_batch_size) == ("127.0.0.1", 8000, 32)


@pytest.mark.parametrize("spec", FIELDS, ids=lambda spec: spec.name)
def test_every_field_is_declared_in_full(spec: dataclasses.Field[object]) -> None:
    assert spec.type in ("str", "int", "float", "bool", "Path")
    assert spec.metadata["help"]
    assert set(spec.metadata["roles"]) <= {"up", "gateway", "worker", "control"}
    if spec.type in ("int", "float"):
        assert spec.metadata["low"] <= spec.default <= spec.metadata["high"]
    assert allowed_values(spec)


@pytest.mark.parametrize(
    ("env", "field", "value"),
    [
        ({"RTS_PORT": " 9000 "}, "port", 9000),
        ({"RTS_MAX_WAIT_MS": "2.5"}, "max_wait_ms", 2.5),
        ({"RTS_MAX_WAIT_MS": "0"}, "max_wait_ms", 0.0),
        ({"RTS_ALLOW_ANONYMOUS": "TRUE"}, "allow_anonymous", True),
        ({"RTS_ALLOW_ANONYMOUS": "0"}, "allow_anonymous", False),
        ({"RTS_PORT": ""}, "port", 8000),
        ({"RTS_DATA_DIR": "/tmp/x"}, "data_dir", Path("/tmp/x")),
        ({"RTS_ENGINE": "my.engines:Fast"}, "engine", "my.engines:Fast"),
        ({"RTS_DTYPE": "float32"}, "dtype", "float32"),
        ({"RTS_HOST": "::1"}, "host", "::1"),
    ],
)
def test_good_values(env: dict[str, str], field: str, value: object) -> None:
    assert getattr(Settings.load(env), field) == value


@pytest.mark.parametrize(
    ("key", "text", "hint"),
    [
        ("RTS_PORT", "80000", "1 to 65535"),
        ("RTS_PORT", "8_000", "whole number"),
        ("RTS_PORT", "8000.0", "whole number"),
        ("RTS_PORT", "١٢", "whole number"),
        ("RTS_PORT", "9" * 30, "whole number"),
        ("RTS_MAX_BATCH_SIZE", "0", "1 to 256"),
        ("RTS_MAX_BATCH_SIZE", "257", "1 to 256"),
        ("RTS_MAX_WAIT_MS", "101", "0 to 100"),
        ("RTS_MAX_WAIT_MS", "nan", "0 to 100"),
        ("RTS_MAX_WAIT_MS", "inf", "0 to 100"),
        ("RTS_AGING_S", "1e999", "0.1 to"),
        ("RTS_ALLOW_ANONYMOUS", "maybe", "1 or 0"),
        ("RTS_DTYPE", "float16", "auto, bfloat16, float32"),
        ("RTS_ENGINE", "vllmm", "torch, echo, vllm or package.module:Class"),
        ("RTS_LOG_LEVEL", "INFO", "info"),
        ("RTS_REDIS_URL", "http://x", "redis://"),
        ("RTS_REDIS_URL", "redis://u:s3cret@h:port", "valid URL"),
        ("RTS_REDIS_URL", "redis://u:s3cret@[h:1", "valid URL"),
        ("RTS_REDIS_URL", "redis://u:s3cret@h:99999", "valid URL"),
        ("RTS_REDIS_URL", "redis://u:s3cret@h/two", "number"),
        ("RTS_REDIS_URL", "unix:///x?db=two&password=s3cret", "only db"),
        ("RTS_REDIS_URL", "unix:///x?db=", "number"),
        ("RTS_REDIS_URL", "rediss://h?ssl_cert_reqs=none", "only db"),
        ("RTS_REDIS_URL", "sentinel://u:s3cret@h1,h2", "must be sentinel://"),
        ("RTS_REDIS_URL", "sentinel://u:s3cret@h1,h2/", "must be sentinel://"),
        ("RTS_REDIS_URL", "sentinel://u:s3cret@h1,,h2/main", "must be sentinel://"),
        ("RTS_REDIS_URL", "sentinel://u:s3cret@/main", "must be sentinel://"),
        ("RTS_REDIS_URL", "sentinel://u:s3cret@h1:port/main", "must be sentinel://"),
        ("RTS_REDIS_URL", "sentinel://u:s3cret@h1/main/two", "must be sentinel://"),
        ("RTS_REDIS_URL", "sentinel://u:s3cret/@h1/main", "must be sentinel://"),
        (
            "RTS_REDIS_URL",
            "sentinel://h1/main?password=s3cret",
            "only sentinel_password, sentinel_u",
        ),
        ("RTS_REDIS_URL", "sentinel://u:s3cret@h1:99999/main", "1 to 65535"),
        ("RTS_REDIS_URL", "sentinelss://u:s3cret@h1/main", "must start with"),
        ("RTS_REDIS_URL", "sentinels://h1/main?ssl_ca_certs=/s3cret", "ssl_ca_certs names no file"),
        ("RTS_REDIS_URL", "sentinel://h1/main?ssl_ca_certs=/s3cret", "only sentinel_password, s"),
        ("RTS_REDIS_URL", "rediss://h1?ssl_ca_certs=/s3cret", "ssl_ca_certs names no file"),
        ("RTS_REDIS_URL", "rediss://h1?ssl_certfile=/s3cret", "go together"),
        ("RTS_REDIS_URL", "rediss://h1?ssl_cert_reqs=none", "only db, ssl_ca_certs, ssl_certfile"),
        ("RTS_REDIS_URL", "redis://h1?ssl_ca_certs=/s3cret", "only db are"),
        ("RTS_TRUSTED_PROXIES", "10.0.0.0/8,me", "'me'"),
        ("RTS_CORS_ORIGINS", "example.org", "origin"),
        ("RTS_MODEL", "a=x,a=y", "two models"),
        ("RTS_MODEL", "a=x,,b=y", "name=source"),
        ("RTS_MODEL", "sp ace=x", "name=source"),
        ("RTS_HOST", "0.0.0.0", "RTS_ALLOW_ANONYMOUS=1"),
        ("RTS_HOST", "localhost.evil.org", "RTS_ALLOW_ANONYMOUS=1"),
    ],
)
def test_bad_values_name_key_and_allowed(key: str, text: str, hint: str) -> None:
    with pytest.raises(SettingsError) as caught:
        Settings.load({key: text})
    assert key in str(caught.value)
    assert hint in str(caught.value)
    assert "s3cret" not in str(caught.value)
    if key != "RTS_REDIS_URL":
        assert text in str(caught.value)


@pytest.mark.parametrize(
    ("url", "parts"),
    [
        ("sentinel://h/main", SentinelUrl((("h", 26379),), "main")),
        (
            "sentinel://u%3A:p%40%2F@h1:1,[::1]:2,h-3.net/my%20main/4"
            "?sentinel_password=%26s&sentinel_username=w",
            SentinelUrl(
                (("h1", 1), ("::1", 2), ("h-3.net", 26379)), "my main", 4, "u:", "p@/", "w", "&s"
            ),
        ),
        ("sentinel://:p@h/main", SentinelUrl((("h", 26379),), "main", password="p")),
    ],
)
def test_sentinel_urls(url: str, parts: SentinelUrl) -> None:
    assert Settings.load({"RTS_REDIS_URL": url}).redis_url == url
    assert parse_sentinel(url) == parts
    assert not parts.password or parts.password not in repr(parts)


def test_beyond_loopback_when_it_is_meant() -> None:
    assert Settings.load({"RTS_HOST": "0.0.0.0", "RTS_ALLOW_ANONYMOUS": "1"}).host == "0.0.0.0"


@pytest.mark.parametrize("name", ["RTS_PROT", "RTS_port", "RTS_", "RTS_MAX_WAIT"])
def test_unknown_variables_stop_the_start(name: str) -> None:
    with pytest.raises(SettingsError, match=f"{name}=1: unknown environment variable"):
        Settings.load({name: "1"})


def test_unknown_names_come_with_the_nearest_known_one() -> None:
    with pytest.raises(SettingsError, match=r"did you mean RTS_PORT\?"):
        Settings.load({"RTS_PROT": "1"})
    with pytest.raises(SettingsError, match=r"did you mean --max-wait-ms\?"):
        Settings.load({}, {"max-wait": "1"})


def test_flags_win_and_are_named_in_errors() -> None:
    assert Settings.load({"RTS_PORT": "9000"}, {"port": "9001"}).port == 9001
    with pytest.raises(SettingsError, match="--max-batch-size=0"):
        Settings.load({}, {"max-batch-size": "0"})
    with pytest.raises(SettingsError, match="unknown flag"):
        Settings.load({}, {"max_batch_size": "1"})


def test_objects_built_in_code_are_checked_too() -> None:
    with pytest.raises(SettingsError, match="RTS_PORT=0"):
        Settings(port=0)
    with pytest.raises(SettingsError, match="RTS_GATEWAYS=3"):
        Settings(port=65534, gateways=3)


def test_secrets_are_not_shown() -> None:
    settings = Settings(redis_url="redis://:geheim@localhost")
    assert "geheim" not in repr(settings)
    for env in ({"RTS_REDIS_URLL": "geheim"}, {"RTS_REDIS_URL": "geheim"}):
        with pytest.raises(SettingsError) as caught:
            Settings.load(env)
        assert "geheim" not in str(caught.value)


def test_environment_of_a_child_gives_the_same_settings() -> None:
    settings = Settings(
        port=9000,
        max_wait_ms=0.25,
        allow_anonymous=True,
        host="0.0.0.0",
        model="a=/x,b=org/y",
        data_dir=Path("/tmp/data"),
    )
    assert Settings.load(settings.to_env()) == settings
    assert "RTS_WORKERS" not in settings.to_env()


def test_models() -> None:
    demo = Settings(data_dir=Path("/d")).models()
    assert demo == (ModelSource(DEMO_MODEL, f"/d/models/{DEMO_MODEL}", is_demo=True),)
    assert Settings(engine="echo").models() == (ModelSource("echo", "echo"),)
    assert Settings(engine="my.mod:Engine").models() == (ModelSource("engine", "engine"),)
    named = Settings(model="org/name, x=./folder/, /a/b.Q4.gguf,/models/llama").models()
    assert named == (
        ModelSource("org/name", "org/name"),
        ModelSource("x", "./folder/"),
        ModelSource("b.Q4", "/a/b.Q4.gguf"),
        ModelSource("llama", "/models/llama"),
    )


def test_names_of_variables_and_flags() -> None:
    assert env_name("max_wait_ms") == "RTS_MAX_WAIT_MS"
    assert flag_name("max_wait_ms") == "--max-wait-ms"


def test_the_page_is_generated_and_current() -> None:
    page = subprocess.run(
        [sys.executable, "-m", "shared.settings"], cwd=ROOT, capture_output=True, check=True
    ).stdout.decode()
    assert page == (ROOT / "docs" / "settings.md").read_text()
    for spec in FIELDS:
        assert f"`{env_name(spec.name)}`" in page
