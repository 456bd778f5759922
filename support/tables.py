"""Tables for the terminal and for Markdown."""


def table(rows, markdown=True):
    """Rows, dicts of equal keys -> a table with the keys as its head, in Markdown or in columns."""
    lines = [list(rows[0]), *([str(value) for value in row.values()] for row in rows)]
    if markdown:
        lines.insert(1, ["---"] * len(lines[0]))
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join(f"{cell:{width}}" for cell, width in zip(line, widths)).rstrip()
                     for line in lines)
