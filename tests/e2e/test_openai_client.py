"""The official `openai` client against a running Hadal.

    pip install openai && HADAL_URL=http://127.0.0.1:8000 python test_openai_client.py

`HADAL_API_KEY` is the server's key, if it has one.
"""

import os
import unittest

import openai

KEY = os.environ.get("HADAL_API_KEY", "")
MESSAGES = [{"role": "user", "content": "What is 2 + 3?"}]


def connect(key=KEY):
    return openai.OpenAI(base_url=os.environ["HADAL_URL"] + "/v1", api_key=key or "none", max_retries=0, timeout=60)


MODEL = connect().models.list().data[0].id
# Models of all kinds must pass: none may end its answer before it began.
GO_ON = {"ignore_eos": True}


class Models(unittest.TestCase):
    def test_the_model_is_listed_with_its_context_length(self):
        model = connect().models.retrieve(MODEL)
        self.assertEqual(model.id, MODEL)
        self.assertGreater(model.max_model_len, 0)
        self.assertIn(MODEL, [model.id for model in connect().models.list()])


class Chat(unittest.TestCase):
    def test_a_whole_answer_has_text_reason_and_usage(self):
        answer = connect().chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=8, temperature=0, extra_body=GO_ON)
        self.assertTrue(answer.choices[0].message.content)
        self.assertEqual(answer.choices[0].message.role, "assistant")
        self.assertIn(answer.choices[0].finish_reason, ("stop", "length"))
        self.assertLessEqual(answer.usage.completion_tokens, 8)
        self.assertEqual(answer.usage.total_tokens, answer.usage.prompt_tokens + answer.usage.completion_tokens)

    def test_a_streamed_answer_is_the_same_text(self):
        ask = {"model": MODEL, "messages": MESSAGES, "max_tokens": 12, "temperature": 0, "extra_body": GO_ON}
        whole = connect().chat.completions.create(**ask)
        chunks = list(connect().chat.completions.create(**ask, stream=True, stream_options={"include_usage": True}))
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        self.assertEqual(text, whole.choices[0].message.content)
        self.assertEqual(chunks[0].choices[0].delta.role, "assistant")
        self.assertEqual(len({chunk.id for chunk in chunks}), 1)
        reasons = [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices]
        self.assertEqual([reason for reason in reasons if reason], [whole.choices[0].finish_reason])
        self.assertEqual(chunks[-1].choices, [])
        self.assertEqual(chunks[-1].usage.completion_tokens, whole.usage.completion_tokens)

    def test_the_client_s_own_accumulator_reads_the_stream(self):
        with connect().chat.completions.stream(model=MODEL, messages=MESSAGES, max_tokens=6, extra_body=GO_ON) as stream:
            for _ in stream:
                pass
            self.assertTrue(stream.current_completion_snapshot.choices[0].message.content)

    def test_log_probabilities_have_bytes_that_make_the_text(self):
        ask = {"model": MODEL, "messages": MESSAGES, "max_tokens": 4, "logprobs": True, "top_logprobs": 3, "extra_body": GO_ON}
        choice = connect().chat.completions.create(**ask).choices[0]
        joined = b"".join(bytes(token.bytes) for token in choice.logprobs.content)
        self.assertEqual(joined.decode(errors="replace"), choice.message.content)
        self.assertTrue(all(len(token.top_logprobs) == 3 for token in choice.logprobs.content))

    def test_one_seed_gives_one_answer(self):
        ask = {"model": MODEL, "messages": MESSAGES, "max_tokens": 8, "seed": 7, "temperature": 1.5, "n": 2}
        answers = [connect().chat.completions.create(**ask) for _ in range(2)]
        texts = [[choice.message.content for choice in answer.choices] for answer in answers]
        self.assertEqual(texts[0], texts[1])
        self.assertEqual([choice.index for choice in answers[0].choices], [0, 1])


class Completions(unittest.TestCase):
    def test_prompts_are_texts_or_token_ids(self):
        for prompt in ("Hello", ["Hello", "there"], [40, 41], [[40], [41, 42]]):
            answer = connect().completions.create(model=MODEL, prompt=prompt, max_tokens=3)
            nested = isinstance(prompt, list) and not isinstance(prompt[0], int)
            self.assertEqual(len(answer.choices), len(prompt) if nested else 1)

    def test_a_stop_string_is_not_part_of_the_answer(self):
        ask = {"model": MODEL, "prompt": [40, 41, 42], "max_tokens": 16, "temperature": 0}
        ask["extra_body"] = GO_ON
        text = connect().completions.create(**ask).choices[0].text
        stop = text[len(text) // 2 :][:2]
        cut = connect().completions.create(**ask, stop=stop).choices[0]
        self.assertEqual((cut.text, cut.finish_reason), (text.split(stop)[0], "stop"))

    def test_a_closed_stream_does_no_harm(self):
        stream = connect().completions.create(model=MODEL, prompt="Hello", max_tokens=64, stream=True)
        next(iter(stream))
        stream.close()
        self.assertTrue(connect().completions.create(model=MODEL, prompt="Hello", max_tokens=2).choices)


class Errors(unittest.TestCase):
    def fails(self, kind, **ask):
        with self.assertRaises(kind) as caught:
            connect().chat.completions.create(**{"model": MODEL, "messages": MESSAGES, "max_tokens": 2, **ask})
        return caught.exception

    def test_each_mistake_is_the_right_exception_and_names_its_field(self):
        self.assertEqual(self.fails(openai.NotFoundError, model="no-such-model").code, "model_not_found")
        bad = openai.BadRequestError
        self.assertEqual(self.fails(bad, temperature=3).param, "temperature")
        self.assertEqual(self.fails(bad, messages=[]).param, "messages")
        self.assertEqual(self.fails(bad, response_format={"type": "json_object"}).param, "response_format")
        tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
        self.assertEqual(self.fails(bad, tools=[tool]).param, "tools")
        self.assertEqual(self.fails(bad, max_tokens=10_000_000).code, "context_length_exceeded")

    def test_a_request_has_an_id(self):
        self.assertTrue(self.fails(openai.BadRequestError, n=0).request_id)

    @unittest.skipUnless(KEY, "the server has no key")
    def test_a_wrong_key_is_refused(self):
        with self.assertRaises(openai.AuthenticationError):
            connect("wrong").models.list()


if __name__ == "__main__":
    unittest.main()
