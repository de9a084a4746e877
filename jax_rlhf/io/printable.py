"""Texts that come from data, models and other people's code, on their way to a terminal."""


def printable(text: str, length: int = 160) -> str:
    """A text on one line of a terminal: without control characters, cut where it is long.

    Args:
      text: any text.
      length: longest, in characters.

    Returns:
      The line.
    """
    line = "".join(character if character.isprintable() else " " for character in text)
    return line if len(line) <= length else line[: length - 1] + "…"


def printable_lines(text: str) -> str:
    """The same for a message of several lines, which stay as they are.

    Args:
      text: any text.

    Returns:
      The lines.
    """
    return "\n".join(
        printable(line.replace("\t", "    "), len(line) + 1 + 4 * line.count("\t")) for line in text.split("\n")
    )
