"""The command line: `realtime-serve <command>`; every setting is a flag of every command."""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import difflib
import json
import os
import sys
from collections.abc import Sequence

from shared.logging import setup_logging
from shared.settings import Settings, SettingsError, allowed_values, env_name, flag_name

_COMMANDS = {
    "up": "start a whole cluster on this machine, in the foreground",
    "gateway": "run one gateway (HTTP)",
    "worker": "run one worker (engine)",
    "control": "run the control process (janitor, statistics)",
    "status": "print what a gateway knows of the cluster",
    "acl": "print an ACL file for Redis: a user with the least rights for each role",
    "dead": "look at requests that engines died over; run them again or drop them",
}
_DEAD = {
    "list": "a line for each dead letter, the oldest first",
    "show": "everything about requests, as JSON",
    "replay": "put requests on their queues again; accepted, their letters are removed",
    "drop": "remove the letters of requests",
}
_USED = {
    "status": ("host", "port"),
    "dead": (
        *("redis_url", "data_dir", "timeout_s", "resumable_retention_s"),
        *("queue_limit", "queue_bytes"),
    ),
}
"""Settings that are in the help of commands that are no processes of the cluster."""
_FAILED = 1
_BAD_SETTINGS = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit status: 0 well, 1 failed, 2 a bad setting."""
    if sys.platform == "win32":
        sys.stderr.write("realtime-serve: this needs Linux or macOS; on Windows run it in WSL2\n")
        return _FAILED
    parser = _parser()
    given, unknown = parser.parse_known_args(argv)
    names = {flag_name(spec.name).removeprefix("--") for spec in dataclasses.fields(Settings)}
    flags = {name: text for name, text in vars(given).items() if name in names}
    try:
        _refuse_unknown(unknown)
        settings = Settings.load(os.environ, flags)
        return _run(given, settings)
    except SettingsError as error:
        sys.stderr.write(f"realtime-serve: error: {error}\n")
        return _BAD_SETTINGS


def _run(given: argparse.Namespace, settings: Settings) -> int:
    # Imported here: a gateway is installed without what a worker needs, and starts sooner.
    if given.command == "up":
        from realtime_serve.screen import Screen
        from realtime_serve.up import run_up

        return run_up(settings, Screen(), end_with_parent=given.end_with_parent)
    if given.command == "status":
        return _print_status(settings)
    if given.command == "acl":
        return _print_acl()
    if given.command == "dead":
        from realtime_serve.dead import run_dead

        return run_dead(
            settings,
            given.action,
            getattr(given, "ids", None) or None,
            as_json=getattr(given, "json", False),
            with_prompt=getattr(given, "prompt", False),
        )
    name = given.command if given.index is None else f"{given.command}-{given.index}"
    setup_logging(settings, name)
    return _run_role(given.command, settings)


def _run_role(role: str, settings: Settings) -> int:
    if not settings.redis_url:
        raise SettingsError("RTS_REDIS_URL=: must name a server; only `up` starts one itself")
    if role == "gateway":
        from gateway.app import main as run_gateway

        return run_gateway(settings)
    if role == "control":
        from control.main import main as run_control

        return run_control(settings)
    if any(model.is_demo for model in settings.models()):
        from realtime_serve.demo_model import DemoModelError, fetch_demo_model
        from realtime_serve.screen import Screen

        try:
            fetch_demo_model(settings.data_dir, Screen(sys.stderr))
        except DemoModelError as error:
            sys.stderr.write(f"realtime-serve: error: {error}\n")
            return _FAILED
    from worker.main import main as run_worker

    return run_worker(settings)


def _print_status(settings: Settings) -> int:
    from realtime_serve import probe

    status, body = asyncio.run(probe.get(settings.host, settings.port, "/status"))
    if status != 200:
        url = probe.base_url(settings.host, settings.port)
        answer = f"answered {status}" if status else "no answer"
        sys.stderr.write(f"realtime-serve: {answer} from {url}; is it the right RTS_PORT?\n")
        return _FAILED
    sys.stdout.write(json.dumps(json.loads(body), indent=2) + "\n")
    return 0


def _print_acl() -> int:
    from shared.access import ROLES, acl_file

    found = {role: os.environ.get(f"{role.upper()}_PASSWORD", "") for role in ROLES}
    if not any(found.values()):
        names = ", ".join(f"{role.upper()}_PASSWORD" for role in ROLES)
        raise SettingsError(f"passwords are read from the environment: {names}, ADMIN_PASSWORD")
    passwords = {role: password for role, password in found.items() if password}
    sys.stdout.write(acl_file(passwords, os.environ.get("ADMIN_PASSWORD", "")))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="realtime-serve",
        description="A streaming inference cluster for language models.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for command, purpose in _COMMANDS.items():
        sub = commands.add_parser(
            command, help=purpose, description=purpose, allow_abbrev=False, add_help=True
        )
        if command == "dead":
            _add_dead(sub)
            continue
        if command == "acl":
            continue
        # Shown in the process list; tells processes of one role apart.
        sub.add_argument("--index", type=int, help=argparse.SUPPRESS)
        sub.add_argument("--end-with-parent", action="store_true", help=argparse.SUPPRESS)
        _add_settings(sub, command)
    return parser


def _add_dead(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="action")
    for action, purpose in _DEAD.items():
        sub = actions.add_parser(action, help=purpose, description=purpose, allow_abbrev=False)
        if action == "list":
            sub.add_argument("--json", action="store_true", help="JSON lines instead of a table")
        elif action == "show":
            sub.add_argument("ids", nargs="+", metavar="id", help="of a request")
            sub.add_argument("--prompt", action="store_true", help="with the prompt's token ids")
        else:
            which = sub.add_mutually_exclusive_group(required=True)
            which.add_argument("ids", nargs="*", default=[], metavar="id", help="of a request")
            which.add_argument("--all", action="store_true", help="of all that have letters")
        _add_settings(sub, "dead")


def _add_settings(parser: argparse.ArgumentParser, command: str) -> None:
    for spec in dataclasses.fields(Settings):
        used = (
            command in spec.metadata["roles"]
            or command == "up"
            or spec.name in _USED.get(command, ())
        )
        shown = f"{spec.metadata['help']} ({allowed_values(spec)}; {env_name(spec.name)})"
        parser.add_argument(
            flag_name(spec.name),
            dest=spec.name.replace("_", "-"),
            metavar=spec.name.upper(),
            default=argparse.SUPPRESS,
            # A flag that is given without a value switches a boolean on.
            nargs="?" if spec.type == "bool" else None,
            const="1" if spec.type == "bool" else None,
            help=shown.replace("%", "%%") if used else argparse.SUPPRESS,
        )


def _refuse_unknown(words: Sequence[str]) -> None:
    if not words:
        return
    known = [flag_name(spec.name) for spec in dataclasses.fields(Settings)]
    near = difflib.get_close_matches(words[0].partition("=")[0], known, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise SettingsError(f"{' '.join(words[:2])}: unknown flag{hint}")


if __name__ == "__main__":
    sys.exit(main())
