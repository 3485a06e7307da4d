"""Checks the data generator without torch or a tokenizer: `python -m unittest` in this folder.

Answers are worked out a second time, from the question's text alone and by other means than the task used.
"""

import calendar
import json
import random
import re
import unittest
from datetime import date, timedelta

import sample as text
from tasks import arithmetic, hadal, letters, measures, mix, records, talk

DRAWS = 400


def numbers(question: str) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", question)]


def subject(question: str, known: str) -> str:
    """The word asked about: what stands in quotes, or else the one that is no part of the question's wording."""
    quoted = re.search(r'"(\w+)"', question)
    if quoted:
        return quoted[1]
    left = [w for w in re.findall(r"\w+", question) if w not in known.split()]
    assert len(left) == 1, question
    return left[0]


class Answers(unittest.TestCase):
    def drawn(self, task):
        rng = random.Random(task.__name__)
        return [task(rng) for _ in range(DRAWS)]

    def test_sums_and_products_are_right(self):
        for task, work in (
            (arithmetic.add, lambda a, b: a + b),
            (arithmetic.multiply, lambda a, b: a * b),
            (arithmetic.long_product, lambda a, b: a * b),
        ):
            for turn in self.drawn(task):
                self.assertEqual(int(turn.answer), work(*numbers(turn.user)), turn)

    def test_differences_are_right_whatever_the_wording(self):
        for turn in self.drawn(arithmetic.subtract):
            a, b = numbers(turn.user)
            if turn.user.startswith("Subtract"):
                a, b = b, a
            self.assertEqual(int(turn.answer), a - b, turn)

    def test_quotient_and_remainder_give_the_dividend_back(self):
        for turn in self.drawn(arithmetic.divide):
            a, b = numbers(turn.user)
            quotient, rest = (*numbers(turn.answer), 0)[:2]
            self.assertEqual(quotient * b + rest, a, turn)
            self.assertLess(rest, b)

    def test_every_line_of_a_thought_is_a_true_equation(self):
        for task in (arithmetic.long_product, arithmetic.long_sum, arithmetic.word_problem):
            for turn in self.drawn(task):
                for line in filter(None, turn.thought.split("\n")):
                    left, right = line.split(" = ")
                    self.assertEqual(eval(left), int(right), turn)  # digits and signs that the task wrote
                self.assertTrue(turn.thought.endswith(turn.answer))

    def test_sums_of_many_numbers_are_right(self):
        for turn in self.drawn(arithmetic.long_sum):
            self.assertEqual(int(turn.answer), sum(numbers(turn.user)))

    def test_lists_are_sorted_and_reversed(self):
        for turn in self.drawn(letters.sort_numbers):
            down = "descending" in turn.user or "largest to" in turn.user
            self.assertEqual(numbers(turn.answer), sorted(numbers(turn.user), reverse=down))
        for turn in self.drawn(letters.sort_words):
            words = turn.answer.split(", ")
            self.assertEqual(words, sorted(words))
            self.assertTrue(all(w in turn.user for w in words))
        for turn in self.drawn(letters.reverse_list):
            self.assertTrue(turn.user.endswith(", ".join(turn.answer.split(", ")[::-1])))

    def test_letters_are_spelled_and_counted(self):
        for turn in self.drawn(letters.spell):
            self.assertIn(turn.answer.replace("-", ""), turn.user)
        for turn in self.drawn(letters.reverse_word):
            self.assertIn(turn.answer.replace("-", "")[::-1], turn.user)
        for turn in self.drawn(letters.length):
            word = subject(turn.user, "How many letters does have How long is Count the letters of word")
            self.assertEqual(int(turn.answer), len(word), turn)
        for turn in self.drawn(letters.count_letter_aloud):
            letters_seen = turn.thought.split("-")
            asked = re.search(r"letter (\w)\b|\b(\w)'s|often is (\w)\b", turn.user)
            self.assertEqual(int(turn.answer), letters_seen.count(asked[1] or asked[2] or asked[3]), turn)

    def test_units_agree_with_the_other_direction(self):
        factors = {(big, small): factor for big, small, factor, _ in measures.UNITS}
        for turn in self.drawn(measures.units):
            (asked,), (got, unit) = numbers(turn.user), turn.answer.split()
            (pair,) = [p for p in factors if unit in p and all(re.search(rf"\b{u}\b", turn.user) for u in p)]
            big, small = (asked, int(got)) if unit == pair[1] else (int(got), asked)
            self.assertEqual(big * factors[pair], small, turn)

    def test_days_and_dates_count_one_by_one(self):
        for task in (measures.weekday, measures.weekday_aloud):
            for turn in self.drawn(task):
                (n,) = numbers(turn.user)
                (day,) = [i for i, name in enumerate(calendar.day_name) if name in turn.user]
                step = -1 if "ago" in turn.user or "before" in turn.user else 1
                for _ in range(n):
                    day = (day + step) % 7
                self.assertEqual(turn.answer, calendar.day_name[day], turn)
        for turn in self.drawn(measures.next_date):
            days, *start = numbers(turn.user)
            self.assertEqual(turn.answer, str(date(*start) + timedelta(days=days)))

    def test_records_survive_json(self):
        for turn in self.drawn(records.build):
            for value in json.loads(turn.answer).values():
                self.assertIn(str(value), turn.user)
        for turn in self.drawn(records.extract):
            self.assertIn(re.sub(r"\s", "", turn.answer), re.sub(r"\s", "", turn.user))

    def test_no_question_has_two_answers(self):
        asked = [question for question, _ in [*hadal.QUESTIONS, *talk.INTRODUCTIONS]]
        self.assertEqual(len(asked), len(set(asked)))


class Conversations(unittest.TestCase):
    def test_every_kind_is_drawn_from_the_side_asked_for(self):
        for kind in mix.KINDS:
            for held_out in (False, True):
                sample = mix.draw(random.Random(5), held_out, kind)
                self.assertEqual(mix.is_held_out(sample), held_out)
                self.assertTrue(all(turn.answer or turn.calls for turn in sample.turns))

    def test_the_same_seed_draws_the_same_conversations(self):
        first, second = ([mix.draw(rng, False) for _ in range(50)] for rng in (random.Random(2), random.Random(2)))
        self.assertEqual(first, second)

    def test_a_code_stands_in_its_text_once(self):
        for seed in range(20):
            sample = mix.draw(random.Random(seed), False, "needle")
            whole = sample.system + sample.turns[0].user
            for turn in sample.turns:
                thing = re.search(r"(?:code of|code does) the (\w+ \w+)(?: have)?[?.](?:\n|$)", turn.user)[1]
                self.assertEqual(re.findall(rf"The code of the {thing} is (\d+)\.", whole), [turn.answer])

    def test_tool_calls_follow_the_schema_they_were_offered(self):
        kinds = {"string": str, "integer": int}
        for seed in range(200):
            sample = mix.draw(random.Random(seed), False, "tool_use")
            offered = {tool["function"]["name"]: tool["function"]["parameters"] for tool in sample.tools}
            self.assertEqual(len(offered), len(sample.tools))
            for name, arguments in sample.turns[0].calls:
                self.assertEqual(list(arguments), offered[name]["required"])
                for key, value in arguments.items():
                    self.assertIsInstance(value, kinds[offered[name]["properties"][key]["type"]])

    def test_special_tokens_stand_only_where_the_format_puts_them(self):
        for kind in mix.KINDS:
            sample = mix.draw(random.Random(9), False, kind)
            said = " ".join(turn.user + turn.answer + turn.thought for turn in sample.turns) + sample.system
            self.assertNotIn("｜", said)
            self.assertNotIn(text.THOUGHT, said)


if __name__ == "__main__":
    unittest.main()
