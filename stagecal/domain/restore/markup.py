"""XML documents of the archive as plain trees: elements by local name, in document order.

What is no XML, or has a document type (which could name entities and other files), raises RestoreError.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from xml.parsers import expat

from stagecal.domain.restore.errors import RestoreError

# Far deeper than any document of the archive.
_DEEPEST = 100


@dataclass
class Element:
    """An element with its local name, attributes, own text, and children.

    `plain` is False if comments, processing instructions or CDATA sections stand between its text: some readers then
    see no text at all. `line` is where it begins.
    """

    name: str
    attributes: Mapping[str, str]
    line: int
    text: str = ""
    plain: bool = True
    children: list[Element] = field(default_factory=list)

    def named(self, name: str) -> list[Element]:
        """Return the children with this local name."""
        return [child for child in self.children if child.name == name]

    def first(self, name: str) -> Element | None:
        """Return the first child with this local name, or None."""
        return next((child for child in self.children if child.name == name), None)

    def below(self, name: str) -> Iterator[Element]:
        """Yield all descendants with this local name, in document order."""
        for child in self.children:
            if child.name == name:
                yield child
            yield from child.below(name)


def parse_markup(text: str, what: str, *, strict: bool = False) -> Element:
    """Given the text of an XML document and what to call it in messages, return its root element.

    Blanks before the XML declaration and prefixes that no namespace explains are taken as they come; with `strict`
    they are refused, as by programs that read by the letter. Raises RestoreError for anything
    that is no XML, has a document type, or is nested without end.
    """
    top = Element("", {}, 0)
    open_elements = [top]
    parser = expat.ParserCreate(namespace_separator=" " if strict else None)

    def start(name: str, attributes: dict[str, str]) -> None:
        if len(open_elements) > _DEEPEST:
            raise RestoreError(f"{what} is nested deeper than {_DEEPEST} elements: look at the file")
        element = Element(_local(name), attributes, parser.CurrentLineNumber)
        open_elements[-1].children.append(element)
        open_elements.append(element)

    def end(_name: str) -> None:
        open_elements.pop()

    def characters(data: str) -> None:
        open_elements[-1].text += data

    def not_plain(*_anything: object) -> None:
        open_elements[-1].plain = False

    def refused(*_anything: object) -> None:
        raise RestoreError(f"{what} has a document type (DOCTYPE), which no archived document has: look at the file")

    parser.StartElementHandler = start
    parser.EndElementHandler = end
    parser.CharacterDataHandler = characters
    parser.CommentHandler = not_plain
    parser.ProcessingInstructionHandler = not_plain
    parser.StartCdataSectionHandler = not_plain
    parser.StartDoctypeDeclHandler = refused
    parser.buffer_text = True
    try:
        parser.Parse(text if strict else text.lstrip("\ufeff \t\r\n"), True)
    except expat.ExpatError as error:
        raise RestoreError(f"{what} is no XML: {error}") from error
    except UnicodeEncodeError as error:
        raise RestoreError(f"{what} has bytes that are no UTF-8: look at the file") from error
    return top.children[0]


def _local(name: str) -> str:
    """Return a name without its prefix, or without its namespace."""
    return name.rpartition(" ")[2].rpartition(":")[2]
