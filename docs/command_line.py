"""The documents that are made from the command line's own help: its page, and the manual page."""

import inspect
import re

NOTE = "<!-- written by scripts/docs: edit the code, not this page -->\n\n"


def verbs() -> list[tuple[str, str, list]]:
    """Return the name, help and parameters of every verb; one with parts, such as `fuse cache`, is told by its parts."""
    import typer.main

    from merganser.cli import make_app

    return [
        (" ".join(filter(None, [name, part])), inspect.cleandoc(inner.help or "").replace("\f", ""), inner.params)
        for name, verb in typer.main.get_command(make_app()).commands.items()
        for part, inner in (getattr(verb, "commands", None) or {"": verb}).items()
    ]


def is_argument(parameter) -> bool:
    """Return whether a parameter of a verb is given by its position."""
    return parameter.param_type_name == "argument"


def is_flag(parameter) -> bool:
    """Return whether an option takes no value."""
    return bool(getattr(parameter, "is_flag", False))


def words(parameter) -> list[str]:
    """Return the words that stand for an option: `--quiet`, `-q`."""
    return [*parameter.opts, *parameter.secondary_opts]


def default_text(parameter) -> str:
    """Return what is said of an option's default, in the form of the help; nothing for flags and where its help says it."""
    said = (getattr(parameter, "help", "") or "").strip()
    hidden = (
        parameter.default is None
        or isinstance(parameter.default, bool | tuple | list)
        or not getattr(parameter, "show_default", True)
    )
    if is_argument(parameter) or hidden or callable(parameter.default) or "[default:" in said:
        return ""
    return f"  [default: {getattr(parameter.default, 'value', parameter.default)}]"


def cli_page() -> str:
    """Make the page of the command line from its own help."""
    lines = [
        "# Command line",
        "",
        "Made from `merganser COMMAND --help`. An option with `...` takes all values up to the",
    ]
    lines += [
        "next option, and may be repeated. Exit codes: 0 done, 1 a defect of Merganser, 2 an error that you can fix,"
    ]
    lines += ["130 stopped by Ctrl-C.", ""]
    for name, told, parameters in verbs():
        own = [parameter for parameter in parameters if parameter.name != "help"]
        arguments = [p.metavar or p.name.upper() for p in own if is_argument(p)]
        lines += [
            f"## merganser {name}",
            "",
            told,
            "",
            "```",
            " ".join(["merganser", name, *arguments, "[OPTIONS]"]),
            "```",
        ]
        lines += ["", "| option | |", "|---|---|"]
        for parameter in own:
            value = parameter.metavar or parameter.name.upper()
            if is_argument(parameter):
                shown = f"`{value}`"
            else:
                shown = ", ".join(f"`{word}`" for word in words(parameter))
                shown += "" if is_flag(parameter) else " `" + value.replace("|", "\\|") + "`"
            said = (getattr(parameter, "help", "") or "").strip()
            lines.append(
                f"| {shown} | {said}{default_text(parameter)}{' Required.' * (parameter.required and not is_argument(parameter))} |"
            )
        lines.append("")
    return NOTE + "\n".join(lines)


MANUAL = r"""
.SH NAME
merganser \- merge large language models on the machine you have
.SH SYNOPSIS
.B merganser
.I COMMAND
.RI [ ARGUMENTS ]
.RI [ OPTIONS ]
.SH DESCRIPTION
A recipe (YAML) says what to merge; every recipe of mergekit is one.
.B merganser merge RECIPE OUT
streams the tensors of its models through a merge method into a new checkpoint, and writes a record beside it.
.B merganser methods
lists the methods, and
.B merganser plan RECIPE
says beforehand what will be read, held in memory and written.
.SH COMMANDS
"""
END_OF_MANUAL = r"""
.SH EXIT STATUS
.TP
0
All went well.
.TP
1
A defect of merganser; please report it with the lines that it printed.
.TP
2
Something that you can mend: the message says where and how.
.TP
130
Stopped by Ctrl-C; the same command continues.
.SH ENVIRONMENT
.TP
.B MERGANSER_DEBUG
If set, errors are printed with the lines of code that they came from.
.TP
.B HF_HUB_OFFLINE
If 1, models of the Hub are taken from its cache alone.
.TP
.B NO_COLOR
If set, nothing is coloured.
"""


def manual_page() -> str:
    """Make the manual page, in the language of man: what `man merganser` shows where the package is installed."""
    from merganser.version import __version__

    def roff(text: str) -> str:
        return re.sub(r"^(?=[.'])", r"\\&", text.replace("\\", r"\e").replace("-", r"\-"), flags=re.MULTILINE)

    lines = [r".\" written by scripts/docs: edit the code, not this page"]
    lines += [f'.TH MERGANSER 1 "" "merganser {__version__}" "User Commands"', MANUAL.strip()]
    for name, told, parameters in verbs():
        own = [p for p in parameters if p.name != "help"]
        arguments = [p.metavar or p.name.upper() for p in own if is_argument(p)]
        lines += [
            f'.SS "{roff(" ".join(["merganser", name, *arguments, "[OPTIONS]"]))}"',
            roff(told).replace("\n\n", "\n.PP\n"),
        ]
        for parameter in own:
            value = roff(parameter.metavar or parameter.name.upper())
            if is_argument(parameter):
                shown = rf"\fI{value}\fR"
            else:
                shown = rf"\fB{roff(', '.join(words(parameter)))}\fR" + (rf" \fI{value}\fR" * (not is_flag(parameter)))
            lines += [".TP", shown, roff((getattr(parameter, "help", "") or "").strip())]
    return "\n".join([*lines, END_OF_MANUAL.strip()]) + "\n"
