"""The scanner of C, C++ and CUDA files: where functions, structs, enums and tables begin and end."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

import cpp_places


def places(text: str) -> list[str]:
    return [str(place) for place in cpp_places.scan(text).places]


def body(text: str, wanted: str) -> str:
    """The text between the braces of the one place with a description."""
    (place,) = cpp_places.scan(text).find(wanted)
    return text[place.begin : place.end]


@pytest.mark.parametrize(
    ("declaration", "name"),
    [
        ("void f(int a) {}", "f"),
        ("static inline struct a * f(struct b * x, int y[3]) {}", "f"),
        ("int a::b::f(int x) const noexcept {}", "a::b::f"),
        ("a::a(int x) : b(x), c{x, 1}, d<int>{2} {}", "a::a"),
        ("a::a() : b{} {}", "a::a"),
        ("a::~a() {}", "a::~a"),
        ("template <typename T, int n = (1 << 3)> std::vector<T> f(std::function<void(int)> g = {}) {}", "f"),
        ("template <> int f<float>(float x) {}", "f"),
        ("auto f(int x) -> decltype(g(x)) {}", "f"),
        ("bool a::operator==(const a & x) const {}", "a::operator=="),
        ("bool operator<(const a & x, const a & y) {}", "operator<"),
        ("int a::operator()(int x) {}", "a::operator()"),
        ("int & a::operator[](int x) {}", "a::operator[]"),
        ("a::operator bool() const {}", "a::operator bool"),
        ("__attribute__((noinline)) static void f(int x) {}", "f"),
        ("template <int D> __launch_bounds__(D, 1) static __global__ void f(const float * x) {}", "f"),
        ("static __global__ void __launch_bounds__(256) f(const float * x) {}", "f"),
        ("API_EXPORT(void) f(int x) {}", "f"),
        ("void f(std::map<int, int> x = {{1, 2}}, int y = int{3}) {}", "f"),
        ("void f(int x) __attribute__((cold)) {}", "f"),
        ("struct a {};", "struct a"),
        ("class a final : public b<int>, c {};", "struct a"),
        ("struct alignas(16) a {};", "struct a"),
        ("union a {};", "struct a"),
        ("typedef struct { int x; } a;", "struct a"),
        ("typedef struct a { int x; } b;", "struct a"),
        ("enum a { b, c };", "enum a"),
        ("enum class a : int { b };", "enum a"),
        ("static const struct a b[c] = { { 1 }, { 2 } };", "table b"),
        ("const std::vector<int> b = { 1, 2 };", "table b"),
        ("int b{1};", "table b"),
        ("static auto b = [](int x) { return x; };", "table b"),
    ],
)
def test_what_a_declaration_opens(declaration: str, name: str) -> None:
    assert places(f"int before;\n{declaration}\nvoid after() {{}}\n") == [name, "after"]


@pytest.mark.parametrize(
    "hidden",
    [
        "// } {",
        "// } \\\n } {",
        "/* } { */",
        'a = "} {\\" }";',
        'a = R"x(} )" {)x";',
        "a = '}'; b = '\\''; c = '{';",
        "a = 1'000'000; b = 0x1p-3'0;",
        "#define X } } {",
        "#define X \\\n } } {",
        "#error don't {",
        '#include "}" // }',
        "#if 0\n } it's { \n#endif",
        "#if 0\n#if A\n } \n#endif\n } \n#endif",
        "#ifdef A\n if (a) {\n#else\n if (b) {\n#endif\n }",
        "#if A\n }\n void g() {\n#elif B\n }\n void h() {\n#endif",
    ],
)
def test_what_does_not_count_as_brackets(hidden: str) -> None:
    found = places(f"void f() {{\n{hidden}\nlast; }}\nvoid after() {{}}\n")
    assert (found[0], found[-1]) == ("f", "after")
    assert found[1:-1] in ([], ["g", "h"])


def test_branch_that_a_condition_leaves_out_is_scanned_too() -> None:
    text = "#if A\nint f() { return 1; }\n#else\nint g() { return 2; }\n#endif\nint h() { return 3; }\n"
    assert places(text) == ["f", "g", "h"]
    assert places(text.replace("#if A", "#if 0")) == ["g", "h"]


def test_names_are_qualified_by_structs_and_namespaces_alone() -> None:
    text = """
        extern "C" { void a() {} }
        namespace { void b() {} }
        namespace n::m { inline namespace k { void c() { struct hidden { void no() {} }; auto f = [] { 1; }; } } }
        struct s : base { enum e { x }; s() : y{1} {} struct t { void d() {} } member; private: void g() const {} };
    """
    assert places(text) == [
        "a", "b", "n::m::k::c", "struct s", "enum s::e", "s::s", "struct s::t", "s::t::d", "s::g",
    ]  # fmt: skip


def test_place_is_found_by_name_kind_and_part_of_its_parameters() -> None:
    text = "void f(a * x) { 1; }\nvoid f(a_b * x, c<d, e> & y) { 2; }\nstruct f { 3; };\nenum f { g };\n"
    scan = cpp_places.scan(text)
    assert len(scan.find("f")) == 2
    assert body(text, "f(a *)") == " 1; "
    assert body(text, "f(c<d,e>)") == " 2; "
    assert body(text, "struct f") == " 3; "
    assert body(text, "enum f") == " g "
    assert scan.find("f(b *)") == scan.find("table f") == scan.find("g") == []


def test_owner_is_the_innermost_place() -> None:
    text = "int x;\nstruct s { int y; void f() { int z; } };\n"
    scan = cpp_places.scan(text)
    assert [str(scan.owner(text.index(letter))) for letter in "xyz"] == ["None", "struct s", "s::f"]


def test_code_is_the_text_with_blanks_for_comments() -> None:
    text = 'a; // b\n#include "c" /* d\n e */\n#if 0\nf;\n#endif\n"// g"; /* h'
    code = cpp_places.scan(text).code
    assert (len(code), code.count("\n")) == (len(text), text.count("\n"))
    assert code.split() == ["a;", "#include", '"c"', "#if", "0", "#endif", '"//', 'g";']


@pytest.mark.parametrize(
    ("anchor", "code", "matches"),
    [
        ("a = b;", "a   =\n b;", True),
        ("a = b;", "a=b;", True),
        ("f( a )", "f(a)", True),
        ("int a", "inta", False),
        ("int a", "int  a", True),
        ("a", "ab", False),
        ("a", "b_a", False),
        ("(a", "f(a)", True),
        ("a.*", "abc", False),
    ],
)
def test_anchor_is_whole_words_with_any_blanks(anchor: str, code: str, matches: bool) -> None:
    assert bool(cpp_places.anchor_pattern(anchor).search(code)) is matches


NOISE = ["", "// }\n", "/* { */", '"}" ;', "'{' ;", "#define X {\n", "#if 0\n}'\n#endif\n", "int x[] = {1};"]
BODIES = ["", "if (a) { b(); }", "auto g = [](int x) { return x; };", "for (;;) { while (c) { d; } }"]
FUNCTIONS = st.tuples(st.sampled_from(NOISE), st.sampled_from(["f", "a::f", "operator+"]), st.sampled_from(BODIES))


@given(st.lists(FUNCTIONS, min_size=1, max_size=6))
def test_every_function_is_found_with_its_body(functions: list[tuple[str, str, str]]) -> None:
    text = "".join(f"\n{noise}\nint {name}(int a)\n{{{body}\n{noise}\n}}\n" for noise, name, body in functions)
    scan = cpp_places.scan(text)
    found = [place for place in scan.places if place.kind == cpp_places.FUNCTION]
    assert [place.name for place in found] == [name for _, name, _ in functions]
    assert [text[place.begin : place.end] for place in found] == [f"{body}\n{noise}\n" for noise, _, body in functions]


@given(st.text(alphabet="ab{}()[]<>;:,=~#\"'/*\\ \n", max_size=200))
def test_no_text_stops_the_scanner(text: str) -> None:
    scan = cpp_places.scan(text)
    assert len(scan.code) == len(text)
    for place in scan.places:
        assert 0 < place.begin <= place.end < len(text)
