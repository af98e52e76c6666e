"""The rights of each role cover what its scripts do, and no more than its names."""

from __future__ import annotations

import hashlib
import re
from importlib import resources

import pytest

from realtime_serve import cli
from shared.access import ROLES, acl_file, user_line
from shared.store import SCRIPTS

SCRIPTS_OF = {
    "gateway": {"enqueue", "attach", "cancel", "leave", "expire", "limit", "refund"},
    "worker": {"take", "emit", "release", "heartbeat", "greet", "depart"},
    "control": {"expire", "forget", "settle"},
    "operator": {"enqueue"},
}


def commands_of(script: str) -> set[str]:
    """What a script and the helpers in front of it call; subcommands as Redis writes them."""
    folder = resources.files("shared").joinpath("scripts")
    found = set()
    for name in ("common", script):
        text = folder.joinpath(f"{name}.lua").read_text()
        for command, sub in re.findall(r"redis\.p?call\('([A-Z]+)'(?:, '([A-Z]+)')?", text):
            container = command in {"XGROUP", "XINFO", "PUBSUB"}
            found.add(f"{command}|{sub}".lower() if container else command.lower())
    return found


def test_every_script_is_somebodys() -> None:
    assert set().union(*SCRIPTS_OF.values()) == set(SCRIPTS)


@pytest.mark.parametrize("role", ROLES)
def test_a_role_may_run_what_its_scripts_call(role: str) -> None:
    allowed = {word[1:] for word in user_line(role, "x").split() if word.startswith("+")}
    for script in SCRIPTS_OF[role]:
        assert commands_of(script) <= allowed, script


@pytest.mark.parametrize("role", ROLES)
def test_nobody_may_look_around_or_destroy(role: str) -> None:
    rules = user_line(role, "x").split()
    assert "-@all" in rules
    assert not {"~*", "&*", "+@all", "+keys", "+scan", "+flushall", "+config", "+acl"} & set(rules)
    assert len(set(rules)) == len(rules)


def test_passwords_are_in_the_file_as_digests_only() -> None:
    text = acl_file({"worker": "pass word", "gateway": "other"}, admin="root's")
    assert [line.split()[1] for line in text.splitlines()] == ["default", "gateway", "worker"]
    assert "pass word" not in text
    assert hashlib.sha256(b"pass word").hexdigest() in text
    assert text.startswith("user default reset on #")
    assert acl_file({"worker": "x"}).startswith("user default reset off\n")
    with pytest.raises(ValueError, match="no such role: wrker"):
        acl_file({"wrker": "x"})


def test_the_command_prints_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for role in (*ROLES, "admin"):
        monkeypatch.delenv(f"{role.upper()}_PASSWORD", raising=False)
    assert cli.main(["acl"]) == 2
    assert "GATEWAY_PASSWORD, WORKER_PASSWORD" in capsys.readouterr().err
    monkeypatch.setenv("CONTROL_PASSWORD", "c")
    monkeypatch.setenv("ADMIN_PASSWORD", "a")
    assert cli.main(["acl"]) == 0
    assert capsys.readouterr().out == acl_file({"control": "c"}, admin="a")
