"""The rule of reward.py, number by number, and what hostile answers may do to it: nothing."""

import multiprocessing
import os
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import reward
from tasks import answers, grader

ALL = ("graded", "no_box", "too_long", "timeouts", "kills", "failed")


def box(answer):
    return rf"So the answer is \boxed{{{answer}}}."


def score(answer, gold):
    return reward.grade([box(answer)], [gold])[0]


def counted(**expected):
    return {f"reward_{name}": expected.get(name, 0) for name in ALL}


def processor_seconds():
    """What the children that have ended took."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def children():
    """Process ids of the children of this process."""
    found = []
    for entry in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{entry}/stat") as file:
                state, parent = file.read().rpartition(")")[2].split()[:2]
                command = Path(f"/proc/{entry}/cmdline").read_bytes()
                if int(parent) == os.getpid() and state != "Z" and b"answers.py" in command:
                    found.append(int(entry))
        except OSError:  # it ended meanwhile
            pass
    return found


@pytest.fixture
def fresh():
    """New children, the old ones gone, and no verdict remembered."""
    reward.GRADER.forget()
    deadline = time.monotonic() + 30
    while children():
        assert time.monotonic() < deadline
        time.sleep(0.01)


# ---- rules 1 to 3: which text is the answer


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        (r"\boxed{5}", "5"),
        (r"first \boxed{6}, no: \boxed{5}", "5"),
        (r"\boxed {5}", "5"),
        (r"<think> \boxed{6} </think> \boxed{5}", "5"),
        (r"\boxed{6} </think> a </think> \boxed{5}", "5"),
        (r"</think> \boxed{5} </think> done", None),
        (r"<think> \boxed{5} </think>", None),
        (r"<think> \boxed{5}", None),
        (r"<think> a </think> <think> \boxed{5}", None),
        ("5", None),
        (r"the answer is $5$, \fbox{5}, \boxed 5", None),
        (r"\boxed{5} and \boxed{6", None),
        (r"\boxed{5} and \boxed{6\}", None),
        (r"\boxed{5} and \boxed{}", None),
        (r"\boxed{5} and \boxed{ }", None),
        (r"\boxed{\frac{1}{2}}}", r"\frac{1}{2}"),
        (r"\boxed{\{1,2\}}", r"\{1,2\}"),
        (r"\boxed{\left\{1,\{2\}\right\}} }", r"\left\{1,\{2\}\right\}"),
        (r"\boxed{\boxed{5}}", "5"),
        (r"\boxed{x = \boxed{5}}", "5"),
        ("\\boxed{\n5\n}", "5"),
        ("", None),
        (None, None),
        (5, None),
        (rb"\boxed{5}", None),
        ([r"\boxed{5}"], None),
    ],
)
def test_the_last_box_after_the_last_thought(response, expected):
    assert reward.boxed(response) == expected
    assert reward.grade([response], ["5"]) == [float(expected == "5")]
    assert reward.load("format")([response], ["5"]) == [float(expected is not None)]


# ---- rules 4 and 5: `gold ; answer ; answer ...`, all equal in the first table and all different in the second

EQUAL = r"""
{3,5} ; 3,5 ; 5,3 ; \{3,5\} ; \{5,3\}
5\text{ million} ; 5 million
25 ; 5² ; ５² ; 5^{2} ; √625
32 ; 2⁵ ; 2^5 ; 2⁴⋅2 ; 2⁶⁻¹
1000000 ; 10⁶ ; 10^6
0.01 ; 10⁻² ; 1⁄100
1/2 ; ½ ; \frac12 ; 1⁄2
2.5 ; 2½ ; 5⁄2
¾x ; \frac{3}{4}x ; 0.75x
x_1+1 ; x₁+1 ; 1+x_{1}
52_8 ; 52₈ ; 42
2^{n+1} ; 2ⁿ⁺¹ ; 2·2ⁿ
5 ; 5.0 ; 5. ; +5 ; 05 ; (5) ; {5} ; \{5\} ; \text{5} ; \mathbf{5} ; $5$ ; \(5\) ; 10/2 ; \sqrt{25} ; 2+3 ; 2+3=5 ; ５
-3 ; −3 ; -3.00 ; -\frac{6}{2} ; {-3} ; \frac{9}{-3}
25 ; 025 ; 25.0 ; 5^2
0 ; -0 ; 0.0 ; 00 ; 1-1 ; \sin\pi ; 10^{-600}-10^{-600}
1/2 ; 0.5 ; .5 ; \frac12 ; \frac{1}{2} ; \dfrac{1}{2} ; \tfrac12 ; \cfrac12 ; \frac 1 2 ; 2/4
1/2 ; \left(\frac12\right) ; 2^{-1} ; \sin 30^\circ
-\frac{1}{2} ; -0.5 ; \frac{-1}{2} ; \frac{1}{-2} ; -1/2
\frac{270}7 ; \frac{270}{7} ; 270/7 ; 38\frac{4}{7}
2.5 ; 2\frac{1}{2} ; 2 1/2 ; \frac52 ; 5/2
\frac13 ; 0.\overline{3} ; 0.\bar{3} ; 1/3 ; \frac{\sqrt{1}}{3}
0.1\overline{6} ; \frac16 ; 1/6
1000 ; 1,000 ; 1{,}000 ; 1\,000 ; 1,\!000 ; 1 000 ; \$1,000 ; 10^3 ; 1e3 ; 1.0E+3 ; 1\times10^3 ; x=1,000
10,\!080 ; 10080 ; 10,080 ; 10080.0
58\,500 ; 58500 ; 58,500
870000000 ; 8.7 \times 10^8 ; 8.7 \cdot 10^{8} ; 8.7e8 ; 8.7×10^8
3.61e-10 ; 3.61 \times 10^{-10} ; 36.1 \times 10^{-11}
36 ; \$36 ; 36\text{ dollars} ; 36 dollars ; €36 ; \boxed{36} ; 36^\circ ; 36\%
90^\circ ; 90 ; 90^{\circ} ; 90° ; 90 degrees ; 90\text{ degrees} ; \angle A = 90^\circ
50\% ; 50 ; 50% ; 50 percent ; 50\text{ percent}
5\text{ cm} ; 5 ; 5 cm ; 5\,\mathrm{cm} ; 5~\text{cm} ; 5.0 \text{ centimeters} ; \frac{10}{2}\text{ cm}
20 ; 20\text{ cm}^2 ; 20\text{ cm}^{2} ; 20\ \text{square units} ; 20\,\text{m}/\text{s} ; 20 \mathrm{~m/s^{2}}
x=5 ; 5 ; x = 5 ; 5=x ; x=5.0
f(x) = x+1 ; x+1 ; f(x)=1+x
2x+1 ; y=2x+1 ; 1+x\cdot 2
y=2x+3 ; y=3+2x ; 2x-y+3=0 ; 2x+3
x+2y=3 ; 2y+x-3=0 ; 2x+4y=6
\text{Evelyn} ; Evelyn ; \mathrm{Evelyn} ; \textbf{Evelyn} ; evelyn ; \text{Evelyn.}
\text{(C)} ; C ; (C) ; \textbf{(C)} ; \text{C} ; C.
\text{No} ; no ; \text{no}
\text{June 20} ; June 20
\text{A and C} ; C, A ; \text{A}, \text{C}
1,-2 ; -2,1 ; -2 \text{ and } 1 ; -2\text{ or }1 ; \{1,-2\} ; x=1 \text{ or } x=-2 ; x=-2, x=1 ; x \in \{1,-2\}
1,-2 ; 1; -2
1,2,3 ; 3, 1, and 2 ; \{2,3,1\} ; 1.0, 2, \frac{6}{2}
100,200 ; 200,100 ; 100, 200
\{1,2\} ; 2,1 ; \{2,1\} ; \left\{1,2\right\} ; \{1,1,2\}
(1,2) ; ( 1, 2 ) ; \left(1,\frac{4}{2}\right) ; (x,y)=(1,2) ; \langle 1,2\rangle
(3,4),(1,2) ; (1,2), (3,4) ; \{(1,2),(3,4)\} ; (1,2)\text{ and }(3,4)
\left(3,\frac{\pi}{2}\right) ; (3,\pi/2) ; (3, 0.5π)
1\pm\sqrt5 ; 1+\sqrt5,1-\sqrt5 ; 1-\sqrt{5}, 1+\sqrt{5} ; x=1\pm\sqrt5
\{1\pm\sqrt5,-2\} ; -2, 1-\sqrt5, 1+\sqrt5
2,-2 ; \pm2 ; x=\pm2
[-2,7] ; x \in [-2,7] ; \left[-2,7\right] ; -2 \le x \le 7 ; 7\ge x\ge-2 ; [-2.0, 14/2]
(5,\infty) ; x>5 ; 5<x ; (5,+\infty) ; x \in (5, \infty)
(-\infty,2)\cup(3,\infty) ; (3,\infty) \cup (-\infty,2) ; x<2 \text{ or } x>3 ; x\in(-\infty,2)\cup(3,\infty)
x+y\le3 ; y+x\leq 3 ; 3\geqslant x+y
\emptyset ; \varnothing ; \{\} ; ∅
\infty ; +\infty ; ∞
\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix} ; \begin{bmatrix}1&2\\3&4\end{bmatrix}
\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix} ; \begin{pmatrix} 1.0 & 4/2 \\ 3 & 2^2 \end{pmatrix}
3+4i ; 4i+3 ; 3+4\mathrm{i} ; z=3+4i ; \frac{25}{3-4i}
-1 ; e^{i\pi} ; i^2 ; \cos\pi
2\sqrt2 ; \sqrt8 ; \sqrt{8} ; 2√2 ; \frac{4}{\sqrt2} ; 8^{1/2} ; 2^{\frac{3}{2}} ; 2sqrt(2)
\frac{\sqrt3}{2} ; \sqrt3/2 ; \frac{\sqrt{3}}2 ; \cos 30^\circ ; \sin\frac{\pi}{3}
\sqrt{7+4\sqrt3} ; 2+\sqrt3
2\pi ; 2π ; \pi\cdot2 ; 2\pi \text{ cm} ; \frac{4\pi}{2}
(x+1)^2 ; x^2+2x+1 ; (1+x)(x+1) ; x^2 + 2 x + 1 ; x**2+2*x+1
\frac{n(n+1)}{2} ; \frac{n^2+n}{2} ; n(n+1)/2 ; \binom{n+1}{2}
\ln 4 ; 2\ln 2
4^n ; 2^{2n}
1 ; \sin^2 x+\cos^2 x ; 0.\overline{9}
120 ; 5! ; \binom{10}{3} ; 3(40) ; (3)(40)
2^{2021} ; 2\cdot 2^{2020}
52_8 ; 52_{8} ; 42
\frac{h}{mv} ; h/(mv) ; \lambda = \frac{h}{mv}
|x-1| ; |1-x| ; \left|x-1\right|
3:2 ; 3 : 2
x\neq3 ; x \ne 3
\lceil n/2\rceil ; \lfloor (n+1)/2\rfloor
\frac{2^n-(-1)^n}{3} ; \frac{2^n+(-1)^{n+1}}{3}
2^{n^2} ; (2^n)^n
\ln(x^2-9) ; \ln((x-3)(x+3))
\gcd(a,b) ; \gcd(b,a) ; \gcd\{a,b\}
x=1,y=2 ; (1,2) ; 1,2 ; (x,y)=(1,2)
\begin{pmatrix}\frac12\\3\end{pmatrix} ; \begin{pmatrix}\frac12\\[4pt]3\\ \end{pmatrix}
\begin{pmatrix}\frac12\\4\end{pmatrix} ; \left(\begin{array}{c}\frac12\\4\end{array}\right)
\{x\mid -2<x<3\} ; (-2,3) ; -2<x<3 ; \{x: -2<x<3\} ; \{x\in\mathbb{R}\mid -2<x<3\}
2k\pi+\frac{\pi}{3}, k\in\mathbb{Z} ; \frac\pi3+2k\pi ; 2k\pi+\frac{\pi}{3}\ (k \in \mathbb{Z})
18 ; 18 eggs ; 18 years ; 18\text{ students}
5\text{ N}\cdot\text{m} ; 5
3\text{ minutes} ; 3\text{ min} ; 3
\frac{4}{3}\pi ; 4/3\pi
\frac{n(n+1)}{2} ; 1/2n(n+1)
\frac{5\pi}{2} ; 2\frac12\pi
E_{1}+1 ; E_1+1
\gamma^2-1 ; -1+\gamma^2 ; (\gamma-1)(\gamma+1)
(0,0,6) ; (0;0;6)
\max\{a,b\} ; \max(a,b)
\text{YES} ; \text{Yes}
1:2:3 ; 2:4:6
-\frac13 ; -1./3
"""

UNEQUAL = r"""
{3,5} ; (3,5) ; [3,5] ; 3,6 ; 3
5\text{ million} ; 5 ; 5\text{ billion}
25 ; 2⁵ ; 5⁵ ; 2⁵⁰
106 ; 10⁶
1/2 ; 1½ ; ⅓ ; ½½
x_1+1 ; x1+1 ; x₂+1
\frac13 ; 0.333 ; 0.33333333 ; 0.333333333333333333333333333333 ; 3 ; 0.3\overline{4}
\pi ; 3.14159265 ; 3.14 ; \frac{22}{7} ; 3.141592653589793238462643383279502884197169399375105820974944592307 ; p
\sqrt2 ; 1.41421356 ; \sqrt3 ; 2 ; \frac{665857}{470832} ; \sqrt{-2}
262537412640768744 ; e^{\pi\sqrt{163}}
0.0000001 ; 0.0000003 ; 0
0 ; 10^{-20} ; 10^{-600} ; \frac{1}{2004!} ; e^{-1000} ; x ; \emptyset ; \{0\ ; \text{zero} ; y-z
\frac{1}{2004!} ; \frac{1}{2006!}
12345678901234567890 ; 12345678901234567891 ; 1.2345678901234567891e19
5 ; 6 ; -5 ; 50 ; 0.5 ; 5.0001 ; 5i ; 5x ; 5! ; 5^2 ; |5|+1 ; e^5 ; \sqrt5 ; \text{five} ; ? ; 5_ ; 5^ ; (5 ; 5)
5 ; 5.5.5
5 ; 5 \text{ or } 6 ; 5, 6 ; 6,5 ; 5 and 6 ; 5;6 ; 5\ 6 ; 5 \lor 6 ; \{5,6\} ; [5,6] ; 5 \text{ (or maybe } 6)
5 ; 5\pm1 ; \pm5 ; 5,5 ; \text{not }5
5 ; \neq 5 ; \ge 5 ; > 5 ; x>5 ; x\le5 ; x\neq5 ; \approx 5 ; 6\to5 ; 6 \Rightarrow 5 ; 6 \\ 5 ; 4=5 ; 5=6
5 ; x=5=6 ; 1=2=3=4=5 ; 2+4=5
8 ; 7=8 ; 8=7 ; x=7=8 ; 3(4) ; 24/4
7 ; 3(4) ; 3 4 ; 3,4
x=5 ; y=5 ; x=6 ; x=-5 ; x^2=25 ; 6 ; x>5
x+2y=3 ; x+2y=4 ; 2x+y=3 ; x-2y=3
f(x) ; f(y) ; g(x) ; f'(x)
2n ; 2N ; 2m ; n ; n^2 ; n+2 ; 2/n
M ; m ; Mg
52_8 ; 52_9 ; 52 ; 52_{16}
21/2 ; 2 1/2 ; 2\frac12 ; 2
1,2 ; (1,2) ; [1,2] ; 1 ; 1,3 ; 1,2,3 ; 12 ; 1,1 ; 1.2
1,2,2 ; 1,1,2
(1,2) ; (2,1) ; [1,2] ; (1,2] ; \{1,2\} ; 1,2 ; (1,2,3) ; 1 ; (1,2),(3,4) ; \begin{pmatrix}1\\2\end{pmatrix}
(2,4) ; \{2,4\} ; [2,4] ; 2<x\le4
[2,5) ; [2,5] ; (2,5) ; (2,5] ; 2\le x\le5 ; [2,6)
(100,200) ; 100200 ; (200,100)
1000 ; 1.000 ; 1,0000 ; 1 ; 10,00
(-\infty,2)\cup(3,\infty) ; (-\infty,2]\cup(3,\infty) ; (-\infty,2) ; x<2 ; (-\infty,2)\cap(3,\infty)
(-\infty,2)\cup(3,\infty) ; (-\infty,3)\cup(2,\infty)
x>5 ; x\ge5 ; x<5 ; y>5 ; 5
\infty ; -\infty ; 0 ; \frac10
\frac10 ; \frac20
1\pm\sqrt5 ; 1+\sqrt5 ; 1\pm\sqrt3 ; 1-\sqrt5
\{1\pm\sqrt5,-2\} ; 1\pm\sqrt5 ; 1\pm\sqrt5,2
\begin{pmatrix}1&2\\3&4\end{pmatrix} ; \begin{pmatrix}1&3\\2&4\end{pmatrix}
\begin{pmatrix}1&2\\3&4\end{pmatrix} ; \begin{vmatrix}1&2\\3&4\end{vmatrix}
\begin{pmatrix}1&2\\3&4\end{pmatrix} ; \begin{pmatrix}1&2&3&4\end{pmatrix} ; -2
A^T ; A ; A'
3+4i ; 3-4i ; 4+3i ; 3+4 ; 7 ; 5
i ; I ; 1 ; -i ; j
7 ; 3+4\mathrm{i}
\text{Evelyn} ; \text{Navin} ; Evelyn Smith ; E
\text{Amy} ; \text{May} ; \text{Am}
\text{(C)} ; \text{(D)} ; D ; \text{C or D} ; C, D ; c
\text{even} ; \text{odd} ; 2 ; \text{not even}
\text{red blue} ; \text{blue red}
5\text{ cm} ; 5\text{ m} ; 6\text{ cm} ; 5\text{ cm}, 6\text{ cm} ; 5 km ; 5\text{ kg}
5 cm ; 5 km ; 5 mm ; 5\text{ km} ; 5 kg ; 5\%
50\% ; 51\% ; 5\% ; 50^\circ
\$36 ; \$63 ; 3.6 ; \$36,000
2 ; 2 sin x ; 2 xy ; 2\cos x ; 2 \text{ or } 2.1 ; \log_2 8
|x| ; x ; -x
\sqrt{x^2+1} ; x+1
(x+1)^2 ; x^2+1 ; x^2+2x+2 ; (x+1)^3 ; (y+1)^2
\frac{x}{3} ; 0.3333333333333333x ; x
\log 2 ; \ln 2 ; 0.30103
\gamma ; \Gamma
\overline{z} ; z
8.7\times10^8 ; 8.7\times10^9 ; 8.7\times10^{-8} ; 8.7
1.2e3 ; 1.2 ; 1.2\cdot e\cdot 3 ; 1.3e3
0.\overline{3} ; 0.3 ; 0.\overline{34}
3:2 ; 2:3 ; 3
\lfloor n^2/4\rfloor ; 0 ; \lfloor n^2/8\rfloor ; n^2/4
n-1+\lfloor n^2/6\rfloor ; n-1
\lfloor\sqrt{n-1}\rfloor ; \lfloor\sqrt{n-2}\rfloor
|x-5| ; 5-x
\max(n,5) ; 5 ; n
m+n-\gcd(m,n) ; m+n-1 ; m+n-\gcd(m,k)
\operatorname{lcm}(m,n) ; mn
5 ; 5\text{ or 6} ; 5\text{ is wrong} ; 5\text{+1} ; 5\text{ million} ; 5\text{ factorial}
n \text{ is odd} ; n \text{ is even} ; n
1:2:3 ; 1:3:2 ; 1:6:1 ; 1:2
x=1,y=2 ; 2,1 ; (2,1) ; x=2,y=1
\pi ; 2\frac{1}{2}\pi
\gamma+1 ; 1
5!! ; (5!)! ; 120
\sum_{i=1}^n x_i ; n x_i
f^{-1}(x) ; \frac1{f(x)}
0.0011_{2} ; 0.0011 ; 0.0011_3
CAB ; ABC
1,000 ; 0,1
3\text{ hours} ; 3\text{ minutes}
15\text{ cm}^2 ; 15\text{ cm}^3 ; 15\text{ m}^2
9\text{ a.m.} ; 9\text{ p.m.}
2:15 ; 4:30
\angle ABC ; \angle ACB
"""


def pairs(table):
    rows = [line.split(" ; ") for line in table.strip().splitlines()]
    return [(gold, answer) for gold, *answers in rows for answer in answers]


@pytest.fixture(scope="module")
def verdicts():
    """All of both tables in one call."""
    rows = pairs(EQUAL) + pairs(UNEQUAL)
    rows += [(gold, gold) for gold, _ in rows]
    rewards = reward.grade([box(answer) for _, answer in rows], [gold for gold, _ in rows])
    return dict(zip(rows, rewards, strict=True))


@pytest.mark.parametrize(("gold", "answer"), pairs(EQUAL))
def test_equal(gold, answer, verdicts):
    assert verdicts[gold, answer] == verdicts[gold, gold] == 1.0


@pytest.mark.parametrize(("gold", "answer"), pairs(UNEQUAL))
def test_unequal(gold, answer, verdicts):
    assert (verdicts[gold, answer], verdicts[gold, gold]) == (0.0, 1.0)


def test_equality_has_no_direction():
    both = [(answer, gold, 1.0) for gold, answer in pairs(EQUAL)] + [(a, g, 0.0) for g, a in pairs(UNEQUAL)]
    both = [(gold, answer, want) for gold, answer, want in both if reward.boxed(box(gold)) == gold]
    rewards = reward.grade([box(gold) for _, gold, _ in both], [answer for answer, _, _ in both])
    assert [row for row, value in zip(both, rewards, strict=True) if value != row[2]] == []


@pytest.mark.parametrize("gold", [5, 5.0, "5", "$5$", r"\boxed{5}", "x=5", " 5\n", "5.", True + 4])
def test_gold_in_any_dress(gold):
    assert (score("5", gold), score("6", gold)) == (1.0, 0.0)


@pytest.mark.parametrize(
    "gold",
    [None, "", " ", r"\boxed{}", b"5", float("nan"), ["5"], 10**5000, object(), "\ud800"],
    ids=lambda gold: type(gold),
)
def test_odd_golds_give_no_credit_and_do_not_raise(gold):
    assert reward.grade([box("5"), r"\boxed{\,}", r"\boxed{None}"], [gold] * 3) == [0.0] * 3


# ---- how answers.py does it


@pytest.mark.parametrize(
    ("pattern", "new", "before", "after"), answers.REWRITES + answers.FOR_SYMPY, ids=lambda value: str(value)[:20]
)
def test_each_rule_does_what_its_example_says(pattern, new, before, after):
    assert before != after
    assert re.sub(pattern, new, before, flags=re.DOTALL) == after


@pytest.mark.parametrize(("pattern", "example"), answers.MISREAD)
def test_each_reason_to_refuse_has_an_example_that_no_other_refuses(pattern, example):
    assert [other for other, _ in answers.MISREAD if re.search(other, example)] == [pattern]


def test_each_name_of_a_sign_becomes_the_sign():
    seen = []
    for sign, names in answers.SIGNS.items():
        for name in names.split():
            # LaTeX's names need their backslash; signs of several characters, and those beyond ASCII, do not.
            written = name if name in ("<=", ">=", "->", "=>", "**") or not name.isascii() else rf"\{name}"
            pattern = next(rule[0] for rule in answers.REWRITES if rule[1] is answers.to_sign)
            assert re.sub(pattern, answers.to_sign, written) == sign, name
            seen.append(name)
    assert len(seen) == len(set(seen)) > 70


@pytest.mark.parametrize(
    ("text", "spelled"),
    [
        ("2⁵", "2^{5}"),
        ("10⁻⁶", "10^{−6}"),
        ("x²³y", "x^{23}y"),
        ("x₁₂", "x_{12}"),
        ("½", r"\frac{1}{2}"),
        ("2⅔+1", r"2\frac{2}{3}+1"),
        ("1⁄2", "1/2"),
        ("⅟3", "1/3"),
        ("５", "5"),
        ("e\u0301", "é"),
        ("plain \\frac12", "plain \\frac12"),
        ("", ""),
    ],
)
def test_what_unicode_writes_in_one_letter_is_spelled_out(text, spelled):
    assert answers.spell_out(text) == spelled


def test_spelling_out_takes_linear_time():
    """Python's own normal form takes 40 seconds for these accents."""
    begun = time.process_time()
    answers.spell_out("a" + "\u0301\u0323" * 100_000)
    assert time.process_time() - begun < 5


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{a}", {0: 2}),
        ("{{}}", {0: 3, 1: 2}),
        ("}{}", {1: 2}),
        ("{{}", {1: 2}),
        (r"{\}}", {0: 3}),
        (r"\{}", {}),
        ("", {}),
    ],
)
def test_matching_braces(text, expected):
    assert answers.matching_braces(text) == expected


# ---- rule 6: hostile answers

SLOW = [  # each takes its child's life
    r"9^{9^{9^{9}}}",
    "(10^6)!",
    r"\binom{1000000000}{500000000}",
    r"\frac{2^{5\cdot10^6}-1}{3^{3\cdot10^6}-1}",
    "(x+1)^{10^6}",
    r"\int_0^1\int_0^1\int_0^1 e^{x^{y^z}}dxdydz",
    r"\prod_{k=1}^{10^7} k",
    "2^{2^{33}}",
]
FAST = [
    "(" * 100 + "4" + ")" * 100,
    "[" * 150 + "5" + "]" * 150,
    "{" * 190 + "5" + "}" * 190 + "+1",
    r"\frac{1}{1+" * 25 + "1" + "}" * 25,
    "9" * 100_000,
    "9" * 399,
    "0." + "3" * 390,
    "1e999999999",
    "1e-999999999",
    "1000000!",
    "(x+1)^{1000000}",
    "5\0",
    "\0",
    "\ud800",
    "\udfff5\ud800",
    "Z\u0351\u036b\u0343\u036a\u0302\u036b\u033d" * 20,
    "\u202e5",
    "🙂",
    "±" * 200,
    "1±1" * 100,
    ",".join(map(str, range(100))),
    ",".join(rf"\sqrt{{{i}}}" for i in range(2, 40)),
    "x=" * 150 + "7",
    r"\frac" * 60,
    r"\sqrt" * 60,
    r"\text{" * 50 + "}" * 50,
    "-" * 399 + "5",
    "a_{" * 90 + "}" * 90,
    r"\infty-\infty",
    "0/0",
    r"\begin{pmatrix}" * 20,
    "__import__('os').system('exit')",
    "\n".join(["5"] * 100),
    "5" + "!" * 50,
    "((((9)!)!)!)!",  # sympy gives up after about as long as the limit, so that either may come first
]


@pytest.mark.parametrize("answer", SLOW[:3] + [pytest.param(answer, marks=pytest.mark.slow) for answer in SLOW[3:]])
def test_a_hostile_answer_costs_its_limit_and_the_start_of_a_child(answer, fresh):
    begun = processor_seconds()
    subprocess.run([sys.executable, "-P", answers.__file__], input=b"", check=True)  # a child that is asked nothing
    start = processor_seconds() - begun
    score("x", "y")
    reward.counts()
    begun = processor_seconds()
    assert score(answer, "5") == 0.0
    assert answers.SECONDS < processor_seconds() - begun < answers.SECONDS + 2 * start + 1
    assert reward.counts() == counted(timeouts=1)
    assert score(answer, answer) == 1.0  # the same text needs no arithmetic


@pytest.mark.parametrize("answer", FAST, ids=range(len(FAST)))
def test_a_malformed_answer_is_wrong(answer):
    reward.counts()
    begun = time.monotonic()
    assert score(answer, "5") == 0.0
    assert time.monotonic() - begun < 30  # where the cores are shared with others
    assert sum(reward.counts().values()) == 1


def test_long_responses_are_searched_in_linear_time():
    texts = [
        "word " * 200_000 + box("5"),
        "".join(rf"\boxed{{{i}}} " for i in range(20_000)) + box("5"),
        r"\boxed{" * 50_000 + "5}",
        "{" * 500_000 + box("5"),
        "$ " * 200_000 + box("5") + "}" * 200_000,
        "<think>" * 50_000 + "</think>" * 50_000 + box("5"),
        r"\boxed{" * 50_000,
        r"\boxed" + " " * 500_000,
    ]
    begun = time.process_time()
    assert reward.grade(texts, ["5"] * 8) == [1.0] * 6 + [0.0] * 2
    assert time.process_time() - begun < 3


def test_good_answers_among_hostile_ones_keep_their_score(fresh):
    good = [
        ("5", "5"),
        (r"\sqrt8", r"2\sqrt2"),
        ("-2,1", "1,-2"),
        (r"\text{Evelyn}", "Evelyn"),
        ("x^2-1", "(x-1)(x+1)"),
    ]
    mixed = [(SLOW[0], "5"), *good, (SLOW[1], "5"), *[(answer, "x") for _, answer in good], (SLOW[2], "5")]
    rewards = reward.grade([box(answer) for answer, _ in mixed], [gold for _, gold in mixed])
    assert rewards == [0.0] + [1.0] * 5 + [0.0] * 7
    assert reward.counts() == counted(graded=10, timeouts=3)


def test_a_group_of_equal_answers_is_graded_once(fresh):
    begun = time.monotonic()
    assert reward.grade([box(SLOW[0])] * 64, ["5"] * 64) == [0.0] * 64
    assert time.monotonic() - begun < 40  # one after the other they take 54 seconds or more
    assert reward.counts() == counted(timeouts=64)


def test_threads(fresh):
    """Eight at once, each with its own answers and one that is hostile."""
    rewards = {}

    def run(i):
        answers = [rf"\sqrt{{{4 * n}}}" for n in range(2, 20)] + ([SLOW[0]] if i == 3 else ["x"])
        golds = [rf"2\sqrt{{{n + (n % 8 == i)}}}" for n in range(2, 20)] + ["5"]
        rewards[i] = reward.grade([box(answer) for answer in answers], golds)

    threads = [threading.Thread(target=run, args=[i]) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert rewards == {i: [float(n % 8 != i) for n in range(2, 20)] + [0.0] for i in range(8)}


def test_a_child_killed_from_outside_costs_no_score(fresh):
    reward.grade([box("x"), box("y")], ["y", "z"])
    first = set(children())
    golds = [rf"{n}\sqrt{{2}}+\sqrt{{3}}" for n in range(2, 80)]
    answers = [box(rf"\sqrt{{3}}+\sqrt{{{2 * n * n}}}") for n in range(2, 80)]
    rewards = []
    thread = threading.Thread(target=lambda: rewards.extend(reward.grade(answers, golds)))
    thread.start()
    time.sleep(0.1)
    for child in first:
        os.kill(child, signal.SIGKILL)
    thread.join()
    assert rewards == [1.0] * len(golds)
    assert not first & set(children())
    for child in children():  # idle ones too
        os.kill(child, signal.SIGTERM)
    assert reward.grade(answers[:2] + [box("n")], [*golds[1::-1], "n"]) == [0.0, 0.0, 1.0]
    assert reward.counts()["reward_failed"] == 0


def test_a_busy_machine_changes_no_score(fresh):
    """The children are stopped for longer than an answer may take, as they may be where many processes want to run."""
    reward.grade([box("x"), box("y")], ["y", "z"])
    stopped = children()
    golds = [rf"{n}\sqrt{{3}}" for n in range(2, 8)]
    rewards = []
    for child in stopped:
        os.kill(child, signal.SIGSTOP)
    thread = threading.Thread(
        target=lambda: rewards.extend(reward.grade([box(rf"\sqrt{{{3 * n * n}}}") for n in range(2, 8)], golds))
    )
    thread.start()
    time.sleep(answers.SECONDS + 1)
    for child in stopped:
        os.kill(child, signal.SIGCONT)
    thread.join()
    assert rewards == [1.0] * 6
    assert reward.counts()["reward_timeouts"] == 0
    assert set(stopped) <= set(children())


def test_a_child_that_no_longer_runs_is_replaced(fresh, monkeypatch):
    monkeypatch.setattr(grader, "WALL_SECONDS", 1.0)
    reward.grade([box("x"), box("y")], ["y", "z"])
    stopped = children()
    for child in stopped:
        os.kill(child, signal.SIGSTOP)
    assert reward.grade([box("m"), box("n")], ["n", "m"]) == [0.0, 0.0]
    assert reward.counts() == counted(timeouts=2, graded=2)
    assert not set(stopped) & set(children())
    assert score(r"\sqrt8", r"2\sqrt2") == 1.0


@pytest.mark.slow
def test_children_stay_below_one_gigabyte(fresh):
    peaks, done = [], threading.Event()

    def watch():
        while not done.wait(0.02):
            for child in children():
                try:
                    if b"answers.py" not in Path(f"/proc/{child}/cmdline").read_bytes():
                        continue  # forked, not yet a program of its own: its memory is that of its parent
                    with open(f"/proc/{child}/status") as file:
                        peaks.append(int(dict(line.split(":", 1) for line in file)["VmPeak"].split()[0]))
                except (OSError, KeyError):
                    pass

    thread = threading.Thread(target=watch)
    thread.start()
    reward.grade([box(answer) for answer in SLOW], ["5"] * len(SLOW))
    done.set()
    thread.join()
    assert 100_000 < max(peaks) <= answers.MEMORY / 1024


def test_a_forked_process_may_grade():
    assert score(r"\sqrt{12}", r"2\sqrt3") == 1.0
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.apply_async(score, (r"\sqrt{20}", r"2\sqrt5")).get(20) == 1.0


SCRIPT = """
import os, sys, time
print("main runs")
sys.path.insert(0, {here!r})
import reward
print(reward.grade([r"\\boxed{{\\sqrt8}}"], [r"2\\sqrt2"]))
for pid in filter(str.isdigit, os.listdir("/proc")):
    with open("/proc/" + pid + "/stat") as file:
        if int(file.read().rpartition(")")[2].split()[1]) == os.getpid():
            print("child", pid, "torch" in open("/proc/" + pid + "/maps").read())
"""


def test_children_leave_main_and_torch_alone_and_end_with_it(tmp_path):
    """The script has no `if __name__ == "__main__"`, as a notebook has none."""
    script = tmp_path / "train.py"
    script.write_text(SCRIPT.format(here=os.path.dirname(os.path.abspath(reward.__file__))))
    lines = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=30).stdout.splitlines()
    assert lines[:2] == ["main runs", "[1.0]"]
    assert len(lines) == 4
    for _, pid, torch in map(str.split, lines[2:]):
        assert torch == "False"
        deadline = time.monotonic() + 5
        while os.path.exists(f"/proc/{pid}") and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not os.path.exists(f"/proc/{pid}")


# ---- a broken verifier


@pytest.fixture
def broken(fresh, monkeypatch, tmp_path):
    """Children that cannot import math-verify."""
    (tmp_path / "math_verify.py").write_text("raise ImportError('no math-verify here')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))


def test_a_broken_verifier_stops_the_run(broken):
    golds = [rf"\sqrt{{{n}}}" for n in range(2, 32)]
    with pytest.raises(RuntimeError, match="verifier failed on 7 of 30 answers"):
        reward.grade([box(f"{n}x") for n in range(30)], golds)
    assert reward.grade([box("5")] * 30, [5] * 30) == [1.0] * 30  # these need no verifier


def test_a_few_failures_are_counted(broken):
    assert reward.grade([box("x"), box("5"), "5", box("9" * 500)], ["y", "5", "5", "5"]) == [0.0, 1.0, 0.0, 0.0]
    assert reward.counts() == counted(failed=1, graded=1, no_box=1, too_long=1)
    assert reward.counts() == counted()


def test_timeouts_do_not_stop_the_run(monkeypatch):
    reward.counts()
    monkeypatch.setattr(reward.GRADER, "ask", lambda gold, answer: "timeouts")
    assert reward.grade([box(f"{n}x") for n in range(20)], ["y"] * 20) == [0.0] * 20
    assert reward.counts() == counted(timeouts=20)


def test_the_cache_is_bounded_and_keeps_the_latest(fresh, monkeypatch):
    monkeypatch.setattr(grader, "CACHED", 2)
    for name in "xyxz":
        score(name, "n")
    assert list(reward.GRADER.verdicts) == [("n", "x"), ("n", "z")]


def test_as_many_golds_as_responses():
    with pytest.raises(ValueError):
        reward.grade([box("5")] * 2, ["5"])


# ---- other rewards


@pytest.mark.parametrize(
    ("response", "gold", "expected"),
    [
        ("40503150=05354", "5354", 1),
        ("40503150=05354", 5354, 1),
        ("1+1=2", "02", 1),
        ("0=000", "0", 1),
        ("=5", "5", 1),
        ("9" * 50_000 + "=" + "9" * 50_000, "9" * 50_000, 1),
        ("40503150=5355", "5354", 0),
        ("40503150", "40503150", 0),
        ("1=5=5", "5", 0),
        ("1=", "0", 0),
        ("1=", "", 0),
        ("1=0", "", 0),
        ("1=0", None, 0),
        ("1= 5", "5", 0),
        ("1=5 ", "5", 0),
        ("1=5\n", "5", 0),
        ("1=+5", "5", 0),
        ("1=-5", "-5", 0),
        ("1=1_0", "10", 0),
        ("1=5.0", "5", 0),
        ("1=٥", "5", 0),
        ("1=²", "2", 0),
        ("1=" + "0" * 100_000 + "x", "5", 0),
        (None, "5", 0),
        (b"1=5", "5", 0),
        ("\ud800=5", "5", 1),
    ],
    ids=range(26),
)
def test_equation(response, gold, expected):
    assert reward.load("equation")([response], [gold]) == [float(expected)]


def test_a_reward_file_may_hold_dataclasses(tmp_path):
    (tmp_path / "mine.py").write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\n"
        "@dataclass\nclass Half:\n    value: float = 0.5\n"
        "def score(responses, golds):\n    return [Half().value for _ in responses]\n"
    )
    assert reward.load(f"{tmp_path / 'mine.py'}:score")(["a", "b"], ["1", "2"]) == [0.5, 0.5]


def test_random_and_always():
    responses, golds = [box("5"), "\ud800"] * 500, ["5"] * 1000
    flips = reward.load("random")(responses, golds)
    assert set(flips) == {0.0, 1.0} and 400 < sum(flips) < 600
    assert len(set(flips[::2])) == 2  # equal answers have coins of their own
    assert flips == reward.load("random")(responses, golds)
    assert flips != reward.load("random")(responses, ["6"] * 1000)
    assert reward.load("always")(responses, golds) == [1.0] * 1000
    assert reward.load("math") is reward.grade


def user(tmp_path, line):
    path = tmp_path / "mine.py"
    path.write_text(f"import math\n\ndef score(responses, golds):\n    {line}\n\nfive = 5\n")
    return f"{path}:score"


@pytest.mark.parametrize(
    "line",
    [
        "return [float(r == g) for r, g in zip(responses, golds)]",
        "return tuple(int(r == g) for r, g in zip(responses, golds))",
        "import numpy; return numpy.array([r == g for r, g in zip(responses, golds)], dtype=numpy.float32)",
    ],
)
def test_a_reward_of_the_user(tmp_path, line):
    rewards = reward.load(user(tmp_path, line))(["a", "b"], ["a", "c"])
    assert rewards == [1.0, 0.0] and [type(value) for value in rewards] == [float, float]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("return [1.0]", "a list of 2 rewards"),
        ("return 1.0", "a list of 2 rewards"),
        ("return None", "a list of 2 rewards"),
        ("return '10'", "a list of 2 rewards"),
        ("return {1: 1.0, 2: 0.0}", "a list of 2 rewards, one for each response, not dict"),
        ("return [1.0, math.nan]", "finite numbers, not nan"),
        ("return [1.0, math.inf]", "finite numbers, not inf"),
        ("return [1.0, None]", "finite numbers, not None"),
        ("return [1.0, '1']", "finite numbers, not '1'"),
    ],
)
def test_a_reward_of_the_user_that_returns_the_wrong_thing(tmp_path, line, message):
    with pytest.raises(ValueError, match=message) as caught:
        reward.load(user(tmp_path, line))(["a", "b"], ["a", "c"])
    assert "\n" not in str(caught.value) and "mine.py:score" in str(caught.value)


def test_a_reward_that_is_not_there(tmp_path):
    path = user(tmp_path, "return [1.0]").removesuffix(":score")
    with pytest.raises(ValueError, match="math, equation"):
        reward.load("maths")
    with pytest.raises(ValueError, match="math, equation"):
        reward.load(path)
    with pytest.raises(OSError, match="there is no file"):
        reward.load("nowhere.py:score")
    for name in ("other", "five", ""):
        with pytest.raises(ValueError, match="define a function"):
            reward.load(f"{path}:{name}")


def test_a_trainer_of_many_gigabytes_gets_the_same_verdicts():
    """A child inherits the peak of its parent's memory in ru_maxrss."""
    code = (
        "import reward; x = bytearray(700 << 20);"
        r"print(reward.grade([r'\boxed{\sqrt{8}}'], [r'2\sqrt2']), reward.counts())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(reward.__file__).parent
    )
    assert done.stdout.startswith("[1.0]") and "'reward_kills': 0" in done.stdout, done.stdout + done.stderr
