"""Worked arithmetic problems with exact answers, made from their number alone."""

import random
from collections.abc import Callable


def _sum(draw: random.Random) -> str:
    a, b = draw.randint(100, 9999), draw.randint(100, 9999)
    lines, carry, place = [f"Question: What is {a} + {b}?"], 0, 0
    while 10**place <= max(a, b):
        x, y = a // 10**place % 10, b // 10**place % 10
        total = x + y + carry
        lines.append(f"{x} + {y} + {carry} = {total}, write {total % 10}, carry {total // 10}.")
        carry, place = total // 10, place + 1
    return "\n".join([*lines, f"Answer: {a + b}"])


def _product(draw: random.Random) -> str:
    a, b = draw.randint(12, 999), draw.randint(12, 99)
    tens, ones = b - b % 10, b % 10
    return (
        f"Question: What is {a} * {b}?\n{b} = {tens} + {ones}.\n{a} * {tens} = {a * tens}.\n{a} * {ones} = {a * ones}.\n"
        f"{a * tens} + {a * ones} = {a * b}.\nAnswer: {a * b}"
    )


def _equation(draw: random.Random) -> str:
    factor, x, shift = draw.randint(2, 12), draw.randint(-40, 60), draw.randint(1, 90)
    right = factor * x + shift
    return (
        f"Question: Solve {factor}x + {shift} = {right}.\nSubtract {shift}: {factor}x = {right} - {shift} = {factor * x}.\n"
        f"Divide by {factor}: x = {factor * x} / {factor} = {x}.\nAnswer: {x}"
    )


def _division(draw: random.Random) -> str:
    divisor, quotient, rest = draw.randint(3, 60), draw.randint(5, 120), 0
    rest = draw.randrange(divisor)
    number = divisor * quotient + rest
    return (
        f"Question: Divide {number} by {divisor}.\n{divisor} * {quotient} = {divisor * quotient}.\n"
        f"{number} - {divisor * quotient} = {rest}, less than {divisor}.\nAnswer: {quotient} remainder {rest}"
    )


def _story(draw: random.Random) -> str:
    name = draw.choice(["Ann", "Ben", "Clara", "Dev", "Eva", "Finn", "Grace", "Hugo"])
    thing = draw.choice(["pens", "apples", "books", "coins", "eggs", "stamps", "cards", "nails"])
    boxes, each = draw.randint(3, 40), draw.randint(4, 48)
    gone = draw.randint(1, boxes * each - 1)
    return (
        f"Question: {name} has {boxes} boxes with {each} {thing} in each and gives away {gone} {thing}. "
        f"How many {thing} are left?\n"
        f"In the boxes there are {boxes} * {each} = {boxes * each} {thing}.\n"
        f"After giving {gone} away, {boxes * each} - {gone} = {boxes * each - gone} are left.\n"
        f"Answer: {boxes * each - gone}"
    )


KINDS: tuple[Callable[[random.Random], str], ...] = (_sum, _product, _equation, _division, _story)


def problem(number: int) -> str:
    """The worked problem with this number; the same on every machine."""
    # seeded by an integer: string seeds and hash() would do as well but say less
    draw = random.Random(1_000_003 * number + 17)
    return KINDS[number % len(KINDS)](draw)


def problems(count: int) -> list[str]:
    """The first `count` problems, in order of their number, each question once."""
    return list(dict.fromkeys(problem(number) for number in range(count)))
