"""Where the functions, structs, enums and tables of a C, C++ or CUDA file begin and end.

Not a parser: it follows brackets, and reads what stands before a { only where declarations stand (in the file, a
namespace, a struct).  Comments, strings, preprocessor lines and what `#if 0` hides count for nothing.  Each branch of
an #if starts with the brackets that were open before it; after #endif, those of the first branch hold.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

FUNCTION, STRUCT, ENUM, TABLE = "function", "struct", "enum", "table"

TOKEN = re.compile(
    r"""
      (?P<comment>   // (?: [^\n\\] | \\. )*  |  /\* .*? (?: \*/ | \Z ) )
    | (?P<directive> ^[ \t]*\# (?: "(?:[^"\\\n]|\\.)*" | /\*.*?\*/ | //(?:[^\n\\]|\\.)* | \\. | [^\n\\] )* )
    | (?P<string>    (?:u8|[uUL])? R"(?P<mark>[^()\\\s]{0,16})\( .*? \)(?P=mark)"  |  " (?: [^"\\\n] | \\. )* " )
    | (?P<char>      ' (?: [^'\\\n] | \\. )+ ' )
    | (?P<number>    \.?\d (?: [eEpP][+-] | '\w | [\w.] )* )
    | (?P<word>      [^\W\d]\w* )
    | (?P<sign>      :: | -> | \S )
    """,
    re.VERBOSE | re.DOTALL | re.MULTILINE,
)
CLOSING = {"(": ")", "[": "]", "{": "}"}


@dataclass
class Place:
    """A piece of a file: kind, qualified name, a function's parameters, and the offsets behind its { and of its }."""

    kind: str
    name: str
    parameters: str
    begin: int
    end: int = -1

    def __str__(self) -> str:
        return self.name if self.kind == FUNCTION else f"{self.kind} {self.name}"


@dataclass
class Scan:
    """A scanned file: its text, the same with blanks in the place of comments, and its places in the file's order."""

    text: str
    code: str
    places: list[Place]

    def owner(self, offset: int) -> Place | None:
        """The innermost place around an offset; None outside of all: in the file itself or in a namespace."""
        around = [place for place in self.places if place.begin <= offset <= place.end]
        return around[-1] if around else None

    def find(self, wanted: str) -> list[Place]:
        """The places with a description: `name` or `name(part of the parameters)`, `struct x`, `enum x`, `table x`."""
        match = re.fullmatch(r"(struct|enum|table) (\S+)|(\S*operator\(\)|[^(]+)(?:\((.*)\))?", wanted)
        if not match:
            return []
        kind, name, function, part = match.groups()
        pattern = anchor_pattern(" ".join(token.group() for token in TOKEN.finditer(part or "")))
        return [
            place
            for place in self.places
            if (place.kind, place.name) == (kind or FUNCTION, name or function) and pattern.search(place.parameters)
        ]


def anchor_pattern(anchor: str) -> re.Pattern[str]:
    """Finds an anchor in code: whole words, and any blanks (also none, beside signs) where it has blanks."""
    pattern = re.sub(r"(?<=\w)\s+(?=\w)", "\0", anchor.strip())  # blanks that part two words
    pattern = r"\s*".join(r"\s+".join(re.escape(word) for word in part.split("\0")) for part in pattern.split())
    first = r"(?<!\w)" if re.match(r"\w", anchor) else ""
    last = r"(?!\w)" if re.search(r"\w$", anchor) else ""
    return re.compile(first + pattern + last)


@dataclass
class Frame:
    """An open bracket."""

    bracket: str
    declares: bool  # whether declarations stand directly in it
    is_read: bool  # whether its contents belong to the declaration that is being read
    scope: str  # what names of declarations in it are qualified with
    places: list[Place] = field(default_factory=list)  # that end where it closes: one, or one of each branch of an #if


State = tuple[list[Frame], list[str]]


class Scanner:
    """One pass over a file: the brackets that are open, and the declaration that is being read."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.code: list[str] = []
        self.copied = 0  # of the text into the code
        self.stack = [Frame("", True, True, "")]
        self.head: list[str] = []
        self.branches: list[list[State]] = []  # of each open #if: before it, and at the end of its first branch
        self.places: list[Place] = []
        self.unnamed: Place | None = None

    def run(self) -> Scan:
        at = 0
        while match := TOKEN.search(self.text, at):
            kind, token, at = match.lastgroup, match.group(), match.end()
            if kind == "comment":
                self.blank(match.start(), at)
            elif kind == "directive":
                at = self.directive(match.start(), at)
            elif kind == "sign":
                self.sign(token, match.start())
            elif self.stack[-1].is_read:
                self.head.append(token if kind == "word" else "0")
        self.code.append(self.text[self.copied :])
        places = [place for place in self.places if place.end >= 0]
        return Scan(self.text, "".join(self.code), sorted(places, key=lambda place: place.begin))

    def blank(self, start: int, end: int) -> None:
        """Puts blanks in the place of what is not code; lines stay lines."""
        self.code += [self.text[self.copied : start], re.sub(r"[^\n]", " ", self.text[start:end])]
        self.copied = end

    def directive(self, start: int, end: int) -> int:
        """Follows a preprocessor line; returns where to go on."""
        for match in re.finditer(r'"(?:[^"\\\n]|\\.)*"|(//.*|/\*.*?\*/)', self.text[start:end], re.DOTALL):
            if match.group(1):
                self.blank(start + match.start(), start + match.end())
        condition = re.match(r"\s*#\s*(if|elif|else|endif)(?:n?def)?\b\s*(.*)", self.text[start:end], re.DOTALL)
        word = condition.group(1) if condition else ""
        if word == "if":
            self.branches.append([self.state()])
            if condition and re.match(r"(0|false)\b", condition.group(2)):
                hidden = end_of_branch(self.text, end)
                self.blank(end, hidden)
                return hidden
        elif word and self.branches:
            states = self.branches[-1]
            if len(states) == 1:
                states.append(self.state())
            for first, frame in zip(states[1][0], self.stack, strict=False):
                first.places += [place for place in frame.places if place not in first.places]
            stack, head = states[word == "endif"]
            self.stack, self.head = list(stack), list(head)
            if word == "endif":
                self.branches.pop()
        return end

    def state(self) -> State:
        return list(self.stack), list(self.head)

    def sign(self, sign: str, start: int) -> None:
        """Follows a bracket; ends or continues the declaration that is being read."""
        frame = self.stack[-1]
        if sign in CLOSING:
            self.stack.append(self.opened(sign, start))
        elif sign in CLOSING.values():
            self.close(sign, start)
        elif frame.declares and (sign == ";" or self.head in (["public"], ["protected"], ["private"])):
            if self.unnamed and self.head:  # typedef struct { ... } name;
                self.unnamed.name = frame.scope + self.head[0]
            self.head, self.unnamed = [], None
        elif frame.is_read:
            self.head.append(sign)

    def opened(self, bracket: str, start: int) -> Frame:
        """The frame of a bracket that opens."""
        outer = self.stack[-1]
        if bracket != "{" or not outer.declares:
            if outer.is_read:
                self.head.append(bracket)
            return Frame(bracket, False, outer.is_read, outer.scope)
        found = read_declaration(self.head)
        if found.is_initializer:
            self.head.append(bracket)
            return Frame(bracket, False, True, outer.scope)
        name = outer.scope + found.name
        scope = f"{name}::" if found.name else outer.scope
        if not found.kind:
            self.head = []
            return Frame(bracket, True, True, scope)
        place = Place(found.kind, name if found.name else "", found.parameters, start + 1)
        self.places.append(place)
        self.head = [*self.head, bracket] if found.kind == TABLE else []
        return Frame(bracket, found.kind == STRUCT, found.kind == STRUCT, scope, [place])

    def close(self, bracket: str, start: int) -> None:
        """Closes the bracket that a closing one belongs to, and those inside it that nothing closed."""
        if not any(CLOSING.get(frame.bracket) == bracket for frame in self.stack):
            return
        while CLOSING.get(self.stack[-1].bracket) != bracket:
            self.stack.pop()
        frame, outer = self.stack.pop(), self.stack[-1]
        kinds = {place.kind for place in frame.places}
        for place in frame.places:
            place.end = start
            self.unnamed = place if place.kind in (STRUCT, ENUM) and not place.name else None
        if bracket == "}" and outer.declares and (frame.declares or kinds - {TABLE}):
            self.head = []
        elif outer.is_read:
            self.head.append(bracket)


def scan(text: str) -> Scan:
    """Scans the text of a file."""
    return Scanner(text).run()


def end_of_branch(text: str, start: int) -> int:
    """Where the branch of an #if ends that begins at start: at its #else, #elif or #endif."""
    depth = 0
    for match in re.compile(r"^[ \t]*#[ \t]*(if|el|endif)", re.MULTILINE).finditer(text, start):
        if depth == 0 and match.group(1) != "if":
            return match.start()
        depth += {"if": 1, "el": 0, "endif": -1}[match.group(1)]
    return len(text)


# -- declarations: what stands before a {

# They take arguments and are no function's name.
ATTRIBUTES = r"__attribute__|__declspec|__launch_bounds__|alignas|decltype|explicit|noexcept|throw|requires|catch"
# What may stand behind a function's parameters, up to its body: words of the language, macros, signs.
WORDS = r"const|volatile|noexcept|override|final|try|requires|mutable|throw|__attribute__|[A-Z_][A-Z_0-9]*"
TRAILING = rf"(?:{WORDS})\b|[^\w\s]|$"
FUNCTION_HEAD = re.compile(rf"(?<!\S)(?!(?:{ATTRIBUTES}) )(?P<name>(?:[\w$]+ :: )*(?:~ )?[\w$]+) @\((?P<group>\d+) ?")
OPERATOR = re.compile(r"(?<!\S)operator (?P<sign>@\(\d+ (?=@\()|[^@]*?(?:@\[\d+ )?)(?=@\()")
KEYWORD = re.compile(r".*(?<!\S)(?P<word>struct|class|union|enum)(?!\S)(?P<name>(?:(?! : ).)*)")


@dataclass
class Declaration:
    """What a declaration's { opens; kind is empty for blocks that only hold other declarations."""

    kind: str = ""
    name: str = ""
    parameters: str = ""
    is_initializer: bool = False  # of a member, in a constructor's list


def read_declaration(tokens: list[str]) -> Declaration:
    """Reads the tokens before a {."""
    line, groups = fold(tokens)
    operator = OPERATOR.search(line)
    if operator:
        line = OPERATOR.sub("operator$ ", line, count=1)
    while (plain := re.sub(r"< [^<>]*>", "", line)) != line:  # template arguments
        line = " ".join(plain.split())
    line = line.removeprefix("template ")
    if namespace := re.match(r"(?:inline )?namespace(?= |$)(.*)", line):
        return Declaration(name=last_word(namespace.group(1)))
    if line in ("", "extern 0"):
        return Declaration()
    if " = " in f" {line} ":
        return Declaration(TABLE, last_word(f"{line} ".split(" = ")[0]))
    if function := function_head(line):
        name = function.group("name").replace(" ", "")
        if operator:
            sign = unfold(operator.group("sign"), groups).replace(" ", "")
            name = name.replace("operator$", f"operator {sign}" if sign[0].isalpha() else f"operator{sign}")
        rest = line[function.end() :].split(" ")
        initializer = ":" in rest and bool(re.match(r"\w", rest[-1]))  # : a @(1 , b
        return Declaration(FUNCTION, name, unfold(" ".join(groups[int(function.group("group"))]), groups), initializer)
    if keyword := KEYWORD.match(line):
        return Declaration(ENUM if "enum" in line.split() else STRUCT, last_word(keyword.group("name")))
    return Declaration(TABLE, last_word(line))


def fold(tokens: list[str]) -> tuple[str, list[list[str]]]:
    """A line of tokens with the contents of brackets put aside: f ( int a ) is "f @(0" and [["int", "a"]]."""
    line: list[str] = []
    groups: list[list[str]] = []
    outer: list[list[str]] = []
    for token in tokens:
        if token in CLOSING:
            outer.append(line)
            line = []
        elif token in CLOSING.values() and outer:
            groups.append(line)
            line = [*outer.pop(), f"@{next(key for key in CLOSING if CLOSING[key] == token)}{len(groups) - 1}"]
        else:
            line.append(token)
    return " ".join(line), groups


def unfold(line: str, groups: list[list[str]]) -> str:
    """The tokens of a line with the contents of its brackets."""

    def contents(match: re.Match[str]) -> str:
        inside = unfold(" ".join(groups[int(match.group(2))]), groups)
        return f"{match.group(1)} {inside} {CLOSING[match.group(1)]}"

    return re.sub(r"@(.)(\d+)", contents, line)


def function_head(line: str) -> re.Match[str] | None:
    """The name and parameters of a function in a declaration, if it declares one."""
    for match in FUNCTION_HEAD.finditer(line):
        if re.match(TRAILING, line[match.end() :]):
            return match
    return None


def last_word(line: str) -> str:
    """The last name of a line, with what qualifies it; array bounds, attributes and `final` do not count."""
    words = [word for word in re.sub(r" ?:: ?", "::", line).split() if re.match(r"[^\W\d][\w:]*$", word)]
    return next((word for word in reversed(words) if word != "final"), "")
