r"""Are two answers equal? `equal(gold, answer)`. Rules 4 and 5 of reward.py. grader.py runs this file in its
children.

Lists, tuples, intervals and relations are taken apart here; then math-verify's LaTeX reader turns each expression
into sympy's, and the difference of two is evaluated to 600 digits.

Known limits. Right but scored 0: overlapping unions, `\mathbb{R} \setminus`, odd roots of negative numbers,
`\cdots`, 50% for 1/2, `\mathbb{R}` and `|x|<1` as intervals, `5 million` for 5000000, `0.\dot{3}` for 1/3, `\lg`,
`\overline{1+i}`. Too kind: words after a number are its unit, and few units are compared; formulas with variables are
compared at random real points (`\sqrt{x}^2` is x), and two letters are a product (`\text{AB}` is BA); `2e-1` is 0.2;
"and" and "or" are both a comma; all `\pm` go together; `100,200` may be a list or a number.
"""

import json
import os
import random
import re
import signal
import sys
import unicodedata
from itertools import groupby

MEMORY = 1 << 30  # bytes of address space of a child
SECONDS = 1.7  # of a processor, for one answer; not of the clock, so that a busy machine changes no verdict
LONGEST = 400  # characters of an answer; the longest gold of the six benchmarks has 204


# ---- what data.py and reward.py need as well: both are linear in the length of the text

BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
# A run and the letter before it, to which its first accent belongs. The length is bounded because the normal
# form of very many accents takes quadratic time.
NOT_ASCII = re.compile(r"[\x00-\x7f]?[^\x00-\x7f]{1,500}")


def matching_braces(text: str, start: int = 0) -> dict[int, int]:
    r"""The place of each `{` from `start` on, and of the `}` that closes it. Those of `\{` and `\}` do not
    count."""
    matching = {}
    opened = []
    for match in BRACE.finditer(text, start):
        if match[0] == "{":
            opened.append(match.start())
        elif match[0] == "}" and opened:
            matching[opened.pop()] = match.start()
    return matching


def spell_out(text: str) -> str:
    r"""The text in unicode's compatible form (NFKC), but `2⁵` as 2^{5}, `x₁` as x_{1} and `½` as \frac{1}{2}.

    NFKC alone would make 25, x1 and 1⁄2 of them.
    """
    if text.isascii():
        return text
    return NOT_ASCII.sub(spell_out_run, text).replace("⁄", "/")


def spell_out_run(match: re.Match) -> str:
    spelled = ""
    for kind, letters in groupby(match[0], key=unicode_kind):
        run = unicodedata.normalize("NFKC", "".join(letters))
        if kind == "<super>":
            spelled += f"^{{{run}}}"
        elif kind == "<sub>":
            spelled += f"_{{{run}}}"
        elif kind == "<fraction>":
            spelled += re.sub(r"(\d+)⁄(\d+)", r"\\frac{\1}{\2}", run)
        else:
            spelled += run
    return spelled


def unicode_kind(letter: str) -> str:
    """What unicode says of letters that stand for others: <super>, <sub>, <fraction>; "" for all else."""
    kind = unicodedata.decomposition(letter).partition(" ")[0]
    return kind if kind in ("<super>", "<sub>", "<fraction>") else ""


# ---- one spelling: each sign that carries structure becomes a single character

# What a sign is called, by LaTeX (without the backslash) or by other signs. ⦃ ⦄ are the braces of a set, ⟦ ⟧
# the brackets of a matrix, ⏎ the end of its row.
SIGNS = {
    # Relations.
    "=": "in ∈",
    "≈": "approx sim",
    "≡": "equiv",
    "≠": "ne neq",
    "<": "lt",
    "≤": "le leq leqslant <=",
    ">": "gt",
    "≥": "ge geq geqslant >=",
    "→": "to rightarrow Rightarrow implies iff longrightarrow Leftrightarrow mapsto -> =>",
    # Brackets.
    "⦃": "{ lbrace",
    "⦄": "} rbrace",
    "⦃⦄": "emptyset varnothing ∅",
    "(": "langle ⟨",
    ")": "rangle ⟩",
    # Operators and constants.
    "∪": "cup",
    "±": "pm",
    "∓": "mp",
    "π": "pi",
    "∞": "infty",
    "°": "circ degree",
    "%": "%",
    "|": "mid vert lvert rvert",
    "-": "− –",
    # What separates.
    "⏎": "\\",
    ",": "lor vee",
    " ": ", ; : quad qquad ~",
    # One name for several.
    r"\sqrt ": "√",
    r"\overline": "bar",
    "^": "**",
    # What only decorates.
    "": "$ € £ ! ( ) [ ] left right middle big Big bigl bigr displaystyle",
    r"\frac": "dfrac tfrac cfrac",
    r"\text": "textbf textit textrm mathrm mbox textnormal",
    r"\binom": "dbinom tbinom",
    r"\cdot ": "times × ·",
    "⟦": "begin{pmatrix}",
    "⟧": "end{pmatrix}",
}
SIGN_OF = {" ": " "}
for _sign, _names in SIGNS.items():
    SIGN_OF.update(dict.fromkeys(_names.split(), _sign))


def to_sign(match: re.Match) -> str:
    return SIGN_OF.get(match[1] or match[0], match[0])


GROUP = r"\{(?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*\}"  # {...} with braces up to three deep

# Rules in the order in which they are applied: pattern, replacement, and an example before and after.
REWRITES = [
    # Thousands are joined.
    (r"(?<=\d)(?:\\[,;:! ]|,\\!|\{,\}|[~ ])+(?=\d{3}(?!\d))", "", r"58\,500", "58500"),
    # All matrices in brackets are pmatrix, their rows without extra space and without an empty last one.
    (r"\\\\\s*\[[\d.]+ ?(?:pt|em|ex|mm|cm)\]", r"\\\\", r"a\\[4pt]b", r"a\\b"),
    (r"\\\\\s*(?=\\end\{)", "", r"b\\ \end{matrix}", r"b\end{matrix}"),
    (r"\\begin\{array\}(?:\[\w\])?\{[clr| ]*\}", r"\\begin{matrix}", r"\begin{array}{cc}", r"\begin{matrix}"),
    (r"\\end\{array\}", r"\\end{matrix}", r"\end{array}", r"\end{matrix}"),
    (
        r"(?:\\left *)?[(\[] *\\begin\{matrix\}(.*?)\\end\{matrix\} *(?:\\right *)?[)\]]",
        r"\\begin{pmatrix}\1\\end{pmatrix}",
        r"\left(\begin{matrix}a\end{matrix}\right)",
        r"\begin{pmatrix}a\end{pmatrix}",
    ),
    (r"(\\begin|\\end)\{[bB]?matrix\}", r"\1{pmatrix}", r"\begin{bmatrix}", r"\begin{pmatrix}"),
    # Functions have their backslash, and signs are single characters.
    (r"(?<![\\A-Za-z])(sin|cos|tan|ln|log|exp|sqrt|pi)(?![a-z])", r"\\\1 ", "2sqrt(2)", r"2\sqrt (2)"),
    (
        r"\\([a-z]+\{pmatrix\}|[A-Za-z]+|.)|[<>]=|[-=]>|\*\*|[^ -}]",
        to_sign,
        r"\{x\leq−5\}",
        "⦃x≤-5⦄",
    ),
    (r"(?:, *)?(?:\\text *\{[ ,]*(?:and|or) *\}|(?<=\s)(?:and|or)(?=\s))", ",", r"1, \text{ and }2", "1,2"),
    (r"\\operatorname\{(\w+)\}", r"\\\1 ", r"\operatorname{lcm}(a,b)", r"\lcm (a,b)"),
    # Space stays only between letters or digits; marks at the end go.
    (r"(?<![A-Za-z0-9])\s+|\s+(?![A-Za-z0-9])", "", "( 1, 2 ) km h", "(1,2)km h"),
    (r"\s+", " ", "km \n h", "km h"),
    (r"[ .,;:$]+$|\$", "", "$5$.", "5"),
    # Degrees, letters that are no text, and a condition that may be said or not.
    (r"\^\{?°\}?", "°", "90^{°}", "90°"),
    (r"\\(?:text|mathbf)\{([ie]|[\d.]+)\}", r"\1", r"3+4\text{i}", "3+4i"),
    (r"(?:\\text\{ ?for ?\})?[,;]?\(?[a-zA-Z]=\\mathbb\{[ZN]\}(?:\^[*+])?\)?$", "", r"2kπ,k=\mathbb{Z}", "2kπ"),
    # Arguments stand in braces.
    (r"(\\sqrt|\^)\(([^()]*)\)", r"\1{\2}", r"\sqrt(n+1)", r"\sqrt{n+1}"),
    (r"\^(-?\d+)", r"^{\1}", "2^-10", "2^{-10}"),
    (r"\\frac ?([^ {\\]|\\[A-Za-z]+)", r"\\frac{\1}", r"\frac12", r"\frac{1}2"),
    (rf"(\\frac{GROUP}) ?([^ {{\\]|\\[A-Za-z]+)", r"\1{\2}", r"\frac{1}2", r"\frac{1}{2}"),
    (r"(\\sqrt(?:\[\w*\])?) ?(\d+|[A-Za-zπ])", r"\1{\2}", r"\sqrt[3]8", r"\sqrt[3]{8}"),
    # Trigonometry is in radians.
    (r"(\\(?:sin|cos|tan|cot|sec|csc)[({ ]*)(\d+)°", r"\1\\frac{\2π}{180}", r"\sin 30°", r"\sin \frac{30π}{180}"),
]


# ---- what sympy's reader would misunderstand


def repeating_decimal(match: re.Match) -> str:
    r"""0.1\overline{6} is (16 - 1) / 90."""
    whole, fixed, repeated = match.groups()
    denominator = 10 ** len(fixed + repeated) - 10 ** len(fixed)
    return rf"\frac{{{whole}{fixed}{repeated}-{whole}{fixed}}}{{{denominator}}}"


def gcd_of_letters(match: re.Match) -> str:
    """sympy takes the gcd of letters for 1 and the lcm for their product. Here it is a name, whatever their
    order."""
    which, first, second = match.groups()
    if (first + second).isdigit():
        return match[0]
    letter = "varrho" if which == "gcd" else "varsigma"
    return rf"\{letter} _{{{''.join(sorted((first, second)))}}}"


def to_base_ten(match: re.Match) -> str:
    return str(int(match[1], int(match[2])))


def capital_i(match: re.Match) -> str:
    return match[1] or r"\Xi "


# Rules as in REWRITES.
FOR_SYMPY = [
    # Its reader takes 3(4) for the mixed number 3 4/1.
    (r"(?<![\^_\d.])(\d+\.?\d*)\(", r"\1\\cdot(", "3(4)", r"3\cdot(4)"),
    (r"\)\(", r")\\cdot(", "(3)(4)", r"(3)\cdot(4)"),
    # Functions of several letters.
    (r"\\(max|min|gcd|lcm)⦃([^⦃⦄]*)⦄", r"\\\1(\2)", r"\max⦃a,b⦄", r"\max(a,b)"),
    (r"\\(gcd|lcm)\((\w+),(\w+)\)", gcd_of_letters, r"\gcd(b,a)", r"\varrho _{ab}"),
    # Mixed numbers are sums. A fraction of digits before a letter is a factor.
    (r"(?<![\w.^}])(\d+)\\frac\{(\d+)\}\{(\d+)\}", r"(\1+\\frac{\2}{\3})", r"2\frac{1}{2}", r"(2+\frac{1}{2})"),
    (r"(\d)\.(?!\d|\\overline)", r"\1", "5.", "5"),
    (r"(?<![\d.^}\w])(\d+)/(\d+) ?(?=[A-Za-zπ\\])", r"\\frac{\1}{\2}", "4/3π", r"\frac{4}{3}π"),
    # It takes Gamma and gamma for the function, E_1 and e_1 for Euler's number, and I for i: they get other
    # names.
    (r"\\Gamma(?!\()", r"\\Upsilon ", r"\Gamma+1", r"\Upsilon +1"),
    (r"\\gamma(?![A-Za-z])", r"\\upsilon ", r"\gamma+1", r"\upsilon +1"),
    (r"(?<![A-Za-z\\])E(?=_)", r"\\Psi ", "E_{1}+1", r"\Psi _{1}+1"),
    (r"(?<![A-Za-z\\])e(?=_)", r"\\psi ", "e_{1}+1", r"\psi _{1}+1"),
    (r"(\\[A-Za-z]+)|I", capital_i, r"\Im+I", r"\Im+\Xi "),
    # Numbers in other notations.
    (r"([\d.]+)[eE]([+-]?\d+)", r"\1\\cdot 10^{\2}", "8.7e8", r"8.7\cdot 10^{8}"),
    (r"(?<![\^_}\d])(\d+) (\d+)/(\d+)", r"(\1+\2/\3)", "2 1/2", "(2+1/2)"),
    (r"(\d+)\.(\d*)\\overline ?\{?(\d+)\}?", repeating_decimal, r"0.1\overline{6}", r"\frac{016-01}{90}"),
    (r"(?<![\w.^}])(\d[0-9A-F]*)_\{?(\d+)\}?(?!\w)", to_base_ten, "52_{8}", "42"),
]

# What is not one expression, what the reader takes for another, and numbers beyond all bounds: pattern and
# example.
MISREAD = [
    (r"!!", "5!!"),
    (r"\d\._?\d*\.\d", "5.5.5"),
    (r"\d\.\d+_", "0.0011_{2}"),
    (r"\\(?:sum|prod)_\{(\w)=.*_\{?\1", r"\sum_{i=1}^{n}x_{i}"),
    (r"[fgh]\^\{-1\}\(", "f^{-1}(x)"),
    (r"\\(?:tri)?angle", r"\angle ABC"),
    (r"\\text", r"5\text{ apples}"),
    (r"\\p?mod", r"3\pmod 7"),
    (r"'", "f'(x)"),
    (r"\^\{?T", "A^T"),
    (r"(?<!_)\b\d+ \d", "3 4"),
    (r"\^\{-?\d{6}", "2^{1000000}"),
    (r"\d{6}!", "1000000!"),
]


# ---- names, words and units

LETTER = r"\\?[A-Za-z]+(?:_\w)?"  # x, \lambda, x_1
NAME = (  # what may stand before `=`
    r"(?:[A-Za-z\\{}|' ]|_\w|_\{[^{}]*\})+\d*(?:\^\{-1\})?(?:\([^()]*\))?"  # x, \angle A, f(x), f^{-1}(x)
    rf"|\({LETTER}(?:,{LETTER})*\)"  # (x,y)
)
WORDS = r"(?i:no)|(?=.*[A-Za-z]{4}|[A-Z][a-z]{2}|[A-Z]{3})[A-Za-z][A-Za-z -]*"  # Evelyn, Amy, CAB, June
UNIT_WORDS = "mm|cm|km|kg|[A-Za-z]{3,}(?: [A-Za-z]{3,}){0,2}"
UNIT = (
    r"(?:/|\\cdot ?)?"  # m/s
    rf"(?:[%°]|\\text\{{(?:[^{{}}]|\{{[^{{}}]*\}})*\}}|(?<=\d) ?(?:{UNIT_WORDS}))"  # 5%, 5\text{ cm}, 18 eggs
    r"(?:\^\{?-?\d\}?)?"  # cm^2
)
# What makes a text more than a unit: 5\text{ or 6}, n\text{ is odd}, 5\text{ million}.
SAYS_WORDS = "or|and|not|is|if|odd|even|for|when|where|hundred|thousand|million|billion|dozen|pairs|squared|factorial"
SAYS = rf"(?<![\^{{\w-])\d|[!?=+;]|(?i:\b(?:{SAYS_WORDS})\b)"

# Units of which one is not another, by any of their names: 5 cm is not 5 km. But 5 is either.
UNITS = [
    "%",
    "° degree",
    "mm",
    "cm",
    "m meter metre",
    "km",
    "g gram",
    "kg",
    "s sec second",
    "min minute",
    "h hr hour",
    "day",
    "week",
    "month",
    "year",
    "inche in",  # inches
    "foot feet ft",
    "mile",
    "yard",
    "dollar",
    "cent",
    "yuan",
    "am",
    "pm",
]
UNIT_OF = {}
for _names in UNITS:
    for _name in _names.split():
        UNIT_OF[_name] = _names
        UNIT_OF[f"{_name}s"] = _names


def rewrite(text: str, rules: list[tuple]) -> str:
    for pattern, new, _, _ in rules:
        text = re.sub(pattern, new, text, flags=re.DOTALL)
    return text


def tidy(text: str) -> str:
    return rewrite(spell_out(text), REWRITES)


# ---- equality of tidy texts: structure first


def split(text: str, marks: str) -> list[str]:
    """Cut at the marks outside all brackets: [text, mark, text, mark, text]."""
    pieces = []
    start = 0
    depth = 0
    for at, letter in enumerate(text):
        if letter in "([{⦃⟦":
            depth += 1
        elif letter in ")]}⦄⟧":
            depth -= 1
        if letter in marks and depth == 0:
            pieces += [text[start:at], letter]
            start = at + 1
    return [*pieces, text[start:]]


def ends(text: str) -> str:
    """The pair of brackets around the whole text, or ""."""
    if text and text[0] in "([{⦃⟦" and split(text, ")]}⦄⟧")[1:] == [text[-1], ""]:
        return text[0] + text[-1]
    return ""


def members(text: str) -> list[str]:
    r"""Of a list, set or union; one for anything else. `1±2` has two; `{5}`, `(5)` and `\text{(C)}` have
    one."""
    # What stands around a single value goes, and so does the name of a set.
    while re.fullmatch(r"\\text\{[^{}]*\}", text) or (ends(text) in ("{}", "()") and not re.search("[,;]", text)):
        text = text.removeprefix(r"\text")[1:-1].strip(" .")
    text = re.sub(rf"^(?:{NAME})=(?=⦃)", "", text)
    text = re.sub(r"^⦃([A-Za-z])(?:=\\mathbb\{R\})?[|:](?=.*\1)(.*)⦄$", r"\2", text)  # {x | x > 2} is x > 2

    # ± stands for both signs. A set has each of its members once. {1,2} is one that has lost its backslashes.
    is_set = ends(text) in ("⦃⦄", "{}")
    if is_set:
        text = text[1:-1]
    found = []
    for part in split(text, ",;⏎∪")[::2]:
        if part:
            above = part.replace("±", "+").replace("∓", "-")
            below = part.replace("±", "-").replace("∓", "+")
            found += dict.fromkeys([above, below])
    return list(dict.fromkeys(found)) if is_set else found


def relation(text: str) -> list[str]:
    """[text, sign, text, ...], the small side first. Bounds on a name become an interval: `2<x` is [x, =,
    (2,∞)]."""
    pieces = split(text, "=≠<>≤≥≈≡→")
    if len(pieces) > 1 and set(pieces[1::2]) <= {">", "≥"}:
        turned = str.maketrans(">≥", "<≤")
        pieces = [piece.translate(turned) for piece in reversed(pieces)]
    if len(pieces) == 3 and pieces[1] in "<≤":
        if re.fullmatch(NAME, pieces[0]):
            pieces = ["-∞", "<", *pieces]
        else:
            pieces = [*pieces, "<", "∞"]
    if len(pieces) == 5 and {pieces[1], pieces[3]} <= {"<", "≤"} and re.fullmatch(NAME, pieces[2]):
        low, left, name, right, high = pieces
        opening = "(" if left == "<" else "["
        closing = ")" if right == "<" else "]"
        pieces = [name, "=", f"{opening}{low},{high}{closing}"]
    return pieces


def values_in_order(text: str) -> list[str]:
    """Of (1,2), [1,2], {1;2} or (x,y)=(1,2), as written."""
    text = re.sub(r"^\([^()]*\)=(?=\()", "", text)
    if ends(text):
        text = text[1:-1]
    return split(text, ",;")[::2]


def by_name(named: list[str], text: str) -> bool | None:
    """Do `x=1`, `y=2` have the values of a `text` without names, in order? None if that is not the
    question."""
    if len(named) < 2:
        return None
    names = []
    mine = []
    for part in named:
        sides = part.split("=")
        if len(sides) != 2 or not re.fullmatch(NAME, sides[0]):
            return None
        names.append(sides[0])
        mine.append(sides[1])
    values = values_in_order(text)
    if len(set(names)) < len(names) or len(values) != len(names):
        return None
    if any("=" in value for value in values):
        return None
    return all(map(same, mine, values))


def same(a: str, b: str) -> bool:
    """Are two tidy texts equal? Takes lists, relations and brackets apart; the rest is for `same_value`."""
    if not a or not b:
        return False
    if a == b:
        return True

    # Lists, sets and unions.
    xs = members(a)
    ys = members(b)
    for named, other in ((xs, b), (ys, a)):
        verdict = by_name(named, other)
        if verdict is not None:
            return verdict
    if len(xs) != 1 or len(ys) != 1:
        return same_members(xs, ys)
    a = xs[0]
    b = ys[0]

    # Equations, inequalities and chains of them.
    xs = relation(a)
    ys = relation(b)
    if len(xs) > 1 and len(ys) > 1:
        if xs[1::2] != ys[1::2]:
            return False
        return all(map(same, xs[::2], ys[::2])) or (xs[1::2] == ["="] and same_value(a, b))
    if len(xs) > 1:
        return chain_is(xs, b)
    if len(ys) > 1:
        return chain_is(ys, a)

    # Tuples, intervals and matrices; times and ratios.
    if ends(a) or ends(b):
        return ends(a) == ends(b) and same_entries(a[1:-1], b[1:-1])
    if re.fullmatch(r"\d{1,2}:\d\d", a) and re.fullmatch(r"\d{1,2}:\d\d", b):
        return a == b  # a time of day, or a ratio that was not reduced
    xs = split(a, ":")[::2]
    ys = split(b, ":")[::2]
    if max(len(xs), len(ys)) > 2:
        return same_ratio(xs, ys)
    return same_value(a, b)


def same_members(xs: list[str], ys: list[str]) -> bool:
    """Does each member of one list have a twin in the other, in any order?"""
    left = list(ys)
    for x in xs:
        twin = next((y for y in left if same(x, y)), None)
        if twin is None:
            return False
        left.remove(twin)
    return bool(xs) and not left


def chain_is(chain: list[str], value: str) -> bool:
    """`x=5` is 5, and so is `2+3=5`: all parts of the chain are equal to the value, but for names."""
    if set(chain[1::2]) != {"="}:
        return False
    values = [part for part in chain[:-1:2] if not re.fullmatch(NAME, part)]
    values.append(chain[-1])
    return all(same(part, value) for part in values)


def same_entries(a: str, b: str) -> bool:
    """Entries in order, between the same marks. A semicolon is a comma."""
    xs = split(a, ",;&⏎")
    ys = split(b, ",;&⏎")
    marks = [mark.replace(";", ",") for mark in xs[1::2]]
    other_marks = [mark.replace(";", ",") for mark in ys[1::2]]
    return marks == other_marks and all(map(same, xs[::2], ys[::2]))


def same_ratio(xs: list[str], ys: list[str]) -> bool:
    """1:2:3 is 2:4:6, and not 1/2/3."""
    first = [f"({part})/({xs[0]})" for part in xs]
    second = [f"({part})/({ys[0]})" for part in ys]
    return len(xs) == len(ys) and all(map(same, first, second))


def equal(gold: str, answer: str) -> bool:
    """The verdict. `1,234` may be a list or a number: both are tried."""
    joined = join_thousands(gold)
    other = join_thousands(answer)
    if same(tidy(joined), tidy(other)):
        return True
    if (joined, other) == (gold, answer):
        return False
    # 1,000 is not the list 0, 1, though int("000") is 0.
    if sorted(re.findall(r"\d+", gold)) != sorted(re.findall(r"\d+", answer)):
        return False
    return same(tidy(gold), tidy(answer))


def join_thousands(text: str) -> str:
    return re.sub(r"(?<![\d.,(\[{])\d{1,3}(?:,\d{3})+(?!\d)", lambda match: match[0].replace(",", ""), text)


# ---- equality of expressions, words and equations (in a child only: this may take for ever)


def same_value(a: str, b: str) -> bool:
    """Equal in value or, if they are words, in spelling; the case of the first letter does not count."""
    from math_verify import verify
    from sympy import Expr

    # A unit may be there or not, if it is one and not another.
    with_unit = re.compile(rf"\+?(.+?)((?:{UNIT})*)")
    a, unit = with_unit.fullmatch(a).groups()
    b, other = with_unit.fullmatch(b).groups()
    if re.search(SAYS, unit) or re.search(SAYS, other):
        return bare(a + unit) == bare(b + other)
    if not same_unit(unit, other):
        return False

    if a == b or re.fullmatch(WORDS, a) or re.fullmatch(WORDS, b):
        return a.lower() == b.lower()
    try:
        x = expression(a)
        y = expression(b)
        if isinstance(x, Expr) and isinstance(y, Expr):
            return agree(x, y)
        return bool(x.free_symbols) and verify(x, y, numeric_precision=LONGEST, timeout_seconds=None)
    except Exception:  # not mathematics, or too odd for sympy
        return False


def bare(text: str) -> str:
    """Without what only sets words apart: 5\\text{ million} is 5 million."""
    return re.sub(r"\\text|[{} ]", "", text)


def same_unit(a: str, b: str) -> bool:
    """False for two different units of UNITS, or one with two different powers. No unit is like any."""
    units = set()
    powers = set()
    for text in (a, b):
        name, _, power = re.sub(r"\\text|[{} .]", "", text).partition("^")
        if name.lower() in UNIT_OF:
            units.add(UNIT_OF[name.lower()])
        if power:
            powers.add(power)
    return len(units) == 0 or (len(units) == 1 and len(powers) <= 1)


def expression(text: str):
    """What sympy makes of it, all decimals exact."""
    from latex2sympy2_extended.latex2sympy2 import ConversionConfig, latex2sympy
    from sympy import Derivative, Float, I, Rational, nan, zoo

    # The single characters become LaTeX again.
    text = rewrite(text, FOR_SYMPY)
    for sign, names in SIGNS.items():
        if sign > "~":
            text = text.replace(sign, f"\\{names.split()[0]} ")
    if any(re.search(pattern, text) for pattern, _ in MISREAD):
        raise ValueError("not one expression, one that is taken for another, or a number beyond all bounds")
    config = ConversionConfig(lowercase_symbols=False)
    x = latex2sympy(text, normalization_config=None, conversion_config=config)

    # Decimals are exact, and i is imaginary unless it is an index.
    exact = {atom: Rational(str(atom)) for atom in x.atoms(Float)}
    if not re.search(r"\\(sum|prod)", text):
        for symbol in x.free_symbols:
            if symbol.name == "i":
                exact[symbol] = I
    value = x.xreplace(exact).doit()
    if value.has(zoo, nan) or x.has(Derivative):
        raise ValueError("no value")
    return value


def agree(x, y) -> bool:
    """Equal at random points, those where both are real: near zero, then far from it; at whole numbers for steps
    such as floor(n/2), and where nothing was real, as (-1)^n. To more digits than an answer can hold."""
    from sympy import I, Rational, ceiling, floor

    names = sorted((x - y).free_symbols, key=str)
    steps = x.has(floor, ceiling) and y.has(floor, ceiling)
    whole = steps and all(str(name)[0] in "ijklmnpqMNK" for name in names)
    digits = 200 if names else 600
    tested = 0
    for k in range(24 if names else 1):
        # Points are fractions near zero, then far from it, and whole numbers in the end.
        if k == 16 and tested and not whole:
            break
        low = -99 * k
        high = 1000
        part = 499
        if whole or k >= 16:
            low = 1
            high = 6 + 3 * k
            part = 1
        elif k >= 10:
            low = -20_000
            high = 20_000
        point = {}
        for name in names:
            point[name] = Rational(random.Random(f"{name} {k}").randint(low, high), part)

        u = x.xreplace(point)
        v = y.xreplace(point)
        if names and not x.has(I) and not (u.evalf().is_real and v.evalf().is_real):
            continue
        tested += 1
        largest = max(1, abs(u.evalf(5))) if names else 1
        most = largest * Rational(1, 10 ** (digits - 100))
        if u != v and ((u - v).is_Rational or abs((u - v).evalf(20, maxn=digits)) > most):
            return False
    return tested > 0


# ---- the child


def memory_peak() -> int:
    """Bytes. Not ru_maxrss: a child begins with its parent's, which for a trainer is gigabytes."""
    try:
        with open("/proc/self/status") as status:
            for line in status:
                if line.startswith("VmHWM"):
                    return int(line.split()[1]) << 10
    except OSError:  # not Linux: RLIMIT_AS has to do
        pass
    return 0


def serve(prepare) -> None:
    """The child: reads [gold, answer] lines, and says a word on each. If what says it raises, the child dies, which
    counts as wrong. `prepare` makes ready what is needed and returns the function of gold and answer."""
    import resource

    # What a library may print is no verdict.
    out = os.dup(1)
    os.dup2(2, 1)

    # What is imported is so here, before memory is limited.
    judge = prepare()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    os.write(out, b"ready\n")

    for line in sys.stdin:
        gold, answer = json.loads(line)
        # When the time is over, SIGPROF ends the process, whatever it is doing.
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        verdict = judge(gold, answer)
        signal.setitimer(signal.ITIMER_PROF, 0)
        os.write(out, f"{verdict}\n".encode())
        # After an answer that took much memory the child makes room for a fresh one.
        if memory_peak() > 300 << 20:
            break


def prepare():
    """sympy is imported, and has to prove that it works."""
    if not equal(r"2\sqrt2", r"\sqrt8") or equal("x", "y"):
        raise SystemExit("math-verify or sympy does not work as it should")
    return lambda gold, answer: "right" if equal(gold, answer) else "wrong"


if __name__ == "__main__":
    serve(prepare)
