"""Text to batches. The oracles: bytes laid out by hand, the 11-token example of section 6, and the `rwkv` package."""

import io
import json
import random
import re
import struct
import sys
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

import pissa_rwkv as P

TRIE_TOKENIZER = pytest.importorskip("rwkv.rwkv_tokenizer").TRIE_TOKENIZER
#        5 6 7 8 0 | 5 6 0 | 9 7 0
TOKENS, STARTS = [5, 6, 7, 8, 0, 5, 6, 0, 9, 7, 0], [0, 5, 8, 11]
SE = '{"mask1": "\\u0006", "mask0": "\\u0008"}'  # learnt: what follows a 6, up to the next 8


def corpus(tokens=TOKENS, starts=STARTS):
    return P.Corpus(np.array(tokens), np.array(starts))


def config(**options):
    return P.Config(**{"data_file": "x.jsonl", "ctx_len": 3, "micro_bsz": 2, "data_shuffle": False, **options})


def loader(texts=None, tokenizer=None, **options):
    """A loader over the example, or over texts."""
    tokenizer = tokenizer or P.ByteTokenizer(256)
    its = P.from_texts([("x", text) for text in texts], tokenizer, "x") if texts else corpus()
    return P.Loader(its, tokenizer, config(**options))


def spans(loader):
    return [loader.span(row) for row in range(loader.pass_rows)]


def random_corpus(draw, documents):
    lengths = [draw.randrange(1, 12) for _ in range(documents)]
    return corpus([draw.randrange(1, 200) for _ in range(sum(lengths))], np.cumsum([0, *lengths]))


# ------------------------------------------------------------------------------------------------------ samplers


def test_pad_cuts_documents_into_rows_that_share_one_token():
    pad = loader(dataload="pad")
    assert [TOKENS[a:b] for a, b in spans(pad)] == [[5, 6, 7, 8], [8, 0], [5, 6, 0], [9, 7, 0]]
    assert pad.bsz == 2


def test_only_is_pad_with_one_row_a_batch_and_no_padding():
    only = loader(dataload="only")
    assert spans(only) == spans(loader(dataload="pad")) and only.bsz == 1
    assert [only.batch(i).inputs.tolist() for i in range(4)] == [[[5, 6, 7]], [[8]], [[5, 6]], [[9, 7]]]


@pytest.mark.parametrize("ctx_len", [1, 2, 3, 5, 11, 100])
@pytest.mark.parametrize("shuffle", [False, True])
def test_every_target_of_every_document_once_a_pass(ctx_len, shuffle):
    text = random_corpus(random.Random(ctx_len), 40)
    rows = P.Loader(text, P.ByteTokenizer(), config(dataload="pad", ctx_len=ctx_len, data_shuffle=shuffle))
    wanted = sorted(set(range(len(text.tokens))) - set(text.starts.tolist()))  # all but a document's first
    for turn in range(3):
        taken = [rows.span(turn * rows.pass_rows + i) for i in range(rows.pass_rows)]
        assert sorted(t for start, stop in taken for t in range(start + 1, stop)) == wanted
        assert max(stop - start for start, stop in taken) <= ctx_len + 1


def test_a_row_is_a_function_of_seed_and_number_alone():
    text, numbers = random_corpus(random.Random(0), 40), list(range(200))
    for dataload in ("pad", "get"):
        def make(seed, dataload=dataload):
            return P.Loader(text, P.ByteTokenizer(), config(dataload=dataload, data_shuffle=True, random_seed=seed))

        in_order, backwards, other = make(7), make(7), make(8)
        forward = [in_order.span(n) for n in numbers]
        assert [backwards.span(n) for n in reversed(numbers)] == forward[::-1]
        assert [other.span(n) for n in numbers] != forward
        n = in_order.pass_rows
        assert [in_order.span(i) for i in range(n)] != [in_order.span(n + i) for i in range(n)]  # each pass anew


def test_get_takes_windows_anywhere_in_the_stream():
    get = loader(dataload="get")
    taken = [get.span(row) for row in range(300)]
    assert {start for start, _ in taken} == set(range(8))  # 0 .. 11 - 4: the first and the last window too
    assert all(stop - start == 4 for start, stop in taken)
    assert get.pass_rows == 3  # 11 tokens by 3
    assert loader(dataload="get", ctx_len=10).span(7) == (0, 11)  # the only one there is


def test_the_default_sampler_is_get_only_for_one_long_document():
    one = P.Loader(corpus(starts=[0, 11]), P.ByteTokenizer(), config())
    short = P.Loader(corpus(starts=[0, 11]), P.ByteTokenizer(), config(ctx_len=10))
    assert (one.sampler, short.sampler, loader().sampler) == ("get", "pad", "pad")
    assert P.Loader(corpus(starts=[0, 11]), P.ByteTokenizer(), config(ctx_len=9)).sampler == "get"


# --------------------------------------------------------------------------------------------------------- masks


def test_se_mask_on_the_example():
    # Document 0: 7 follows 6, and 8 ends it. Document 1: 0 follows 6. Document 2 has no mark: all of it.
    learnt = loader(dataload="pad", loss_mask="se", mask_id=SE).learnt(0, 11).astype(int).tolist()
    assert learnt == [0, 0, 1, 0, 0] + [0, 0, 1] + [1, 1, 1]


def test_rows_that_teach_nothing_are_left_out():
    rows = loader(dataload="pad", loss_mask="se", mask_id=SE)
    assert spans(rows) == [(0, 4), (5, 8), (8, 11)]  # not 8 0, whose only target is not learnt
    shared = loader(["abcdexyz"], dataload="pad", loss_mask="se", mask_id='{"mask1": "c", "mask0": "e"}')
    assert spans(shared) == [(0, 4)]  # not d e x y, of which d is learnt, but as the target of the row before


def test_batch_has_targets_shifted_by_one_and_learns_no_padding():
    rows = loader(dataload="pad")
    batch = rows.batch(0)
    assert batch.inputs.tolist() == [[5, 6, 7], [8, 0, 0]]
    assert batch.learnt.tolist() == [0, 1, 2, 3] and batch.targets.tolist() == [6, 7, 8, 0]
    masked = loader(dataload="pad", loss_mask="se", mask_id=SE).batch(0)
    assert masked.inputs.tolist() == [[5, 6, 7], [5, 6, 0]]
    assert masked.learnt.tolist() == [1, 4] and masked.targets.tolist() == [7, 0]
    assert rows.batch(1, last=3).inputs.tolist() == [[5, 6]]


@pytest.mark.parametrize("mask", ["pad", "se"])
@pytest.mark.parametrize("sampler", ["pad", "only", "get"])
def test_batch_equals_its_rows_one_by_one(sampler, mask):
    rows = loader(dataload=sampler, loss_mask=mask, mask_id=SE, data_shuffle=True)
    for number in range(6):
        batch, found = rows.batch(number), {}
        assert batch.inputs.dtype == batch.targets.dtype == torch.int64
        for position, target in zip(batch.learnt.tolist(), batch.targets.tolist(), strict=True):
            found[divmod(position, batch.inputs.shape[1])] = target
        wanted = {}
        spans = [rows.span(number * rows.bsz + i) for i in range(rows.bsz)]
        for i, (start, stop) in enumerate(sorted(spans, key=lambda span: span[0] - span[1])):
            assert batch.inputs[i, : stop - start - 1].tolist() == TOKENS[start: stop - 1]
            assert not batch.inputs[i, stop - start - 1:].any()
            learnt = rows.learnt(start, stop)
            wanted |= {(i, t - 1): TOKENS[start + t] for t in range(1, stop - start) if learnt[t]}
        assert found == wanted


@pytest.mark.parametrize("last", [120, 43])
def test_a_step_has_the_same_rows_in_less_padding(last):
    """However many micro-batches it has; what is learnt of each row is the same."""
    draw = np.random.default_rng(0)
    texts = ["".join(map(chr, draw.integers(97, 123, draw.integers(1, 40)))) for _ in range(last)]
    its = P.from_texts([("x", text) for text in texts], P.ByteTokenizer(), "x")
    found, sizes = [], []
    for together in (1, 5, 0):                                         # 0: the whole pass
        rows = P.Loader(its, P.ByteTokenizer(), config(ctx_len=64, micro_bsz=4, dataload="pad"), together)
        batches = [rows.batch(i, last=rows.pass_rows) for i in rows.one_pass]
        assert [len(b.inputs) for b in batches[:-1]] == [4] * (len(batches) - 1)
        learnt = [sorted(zip(b.learnt % b.inputs.shape[1], b.targets, strict=True)) for b in batches]
        step = 5 if together != 0 else len(batches)
        found.append([sorted(sum(learnt[at: at + step], [])) for at in range(0, len(batches), step)])
        sizes.append(sum(b.inputs.numel() for b in batches))
        widths = [b.inputs.shape[1] for b in batches[: rows.together]]
        assert widths == sorted(widths, reverse=True)
    assert found[0] == found[1] and sorted(sum(found[0], [])) == found[2][0]
    tokens = sum(map(len, texts))
    assert sizes[0] > sizes[1] > sizes[2] and sizes[2] < 1.1 * tokens, (sizes, tokens)
    one = P.Loader(its, P.ByteTokenizer(), config(ctx_len=64, micro_bsz=4, dataload="pad"))
    said = re.search(r"(\d+)% of what is computed is padding", one.summary())
    assert abs(int(said[1]) / 100 - (1 - tokens / sizes[0])) < 0.02
    assert "padding" not in rows.summary()


def test_summary_numbers():
    short = P.Corpus(np.array([*TOKENS, 0, 7, 0]), np.array([*STARTS, 12, 14]))  # and documents of one token and two
    text = P.Loader(short, P.ByteTokenizer(), config(dataload="pad", micro_bsz=1)).summary()
    assert text == ("5 documents, 14 tokens, 5 rows a pass (pad), 100.0% of the targets learnt;"
                    " 1 documents of fewer than two tokens skipped; 1 documents of up to 5 tokens cut after every 3")
    across = P.Loader(short, P.ByteTokenizer(), config(dataload="get")).summary()
    assert across == "5 documents, 14 tokens, 4 rows a pass (get), 100.0% of the targets learnt"
    # The rows 5 6 7 8, 5 6 0 and 9 7 0 have 7 targets; learnt are 7, 0, and 7 0.
    assert loader(dataload="pad", loss_mask="se", mask_id=SE).summary() == (
        "3 documents, 11 tokens, 3 rows a pass (pad), 57.1% of the targets learnt;"
        " 1 documents of up to 5 tokens cut after every 3; 1 rows with nothing to learn left out; 1 documents have no"
        " match for --loss_mask and are learnt whole (the first begins '\\t\\x07\\x00')")


# ------------------------------------------------------------------------------------------ qa, found in bytes


@pytest.fixture(scope="module")
def official():
    return TRIE_TOKENIZER(str(P.world_vocabulary()))


@pytest.fixture(scope="module")
def world():
    return P.WorldTokenizer(P.world_vocabulary())


# Each conversation in pieces: what an assistant writes, and the role that ends it, stand in the odd places.
CONVERSATIONS = {
    "one turn": ["User: Hi\n\nAssistant:", " Hello there."],
    "no space, quotes": ['User:"Hi"\n\nAssistant:', '"Hello."'],
    "turns": ["User: 1+1?\n\nAssistant:", " 2\n\nUser:", " 2+2?\n\nAssistant:", " 4"],
    "system": ["System: Be brief.\n\nUser: Why?\n\nAssistant:", " Because."],
    "chinese": ["User: 你好。\n\nAssistant:", " 你好！很高兴。\n\nUser:", "再见。\n\nAssistant:", "再见。"],
    "blank lines in the answer": ["User: List.\n\nAssistant:", " a\n\nb\n\n\nc\n\nUser:", " More.\n\nAssistant:", " d"],
    "CRLF": ["User: Hi\r\n\r\nAssistant:", " a\r\n\r\nb\r\n\r\nUser:", " Bye\r\n\r\nAssistant:", " c"],
    "ends with the user": ["User: Hi\n\nAssistant:", " Yes\n\nUser:", " Bye"],
    "roles named inside lines": ["User: say Assistant: x\n\nAssistant:", " the User: of a System: is\nmy User:\n"],
    "empty answer": ["User: Hi\n\nAssistant:", ""],
    "starts with the assistant": ["Assistant:", " Hello\n\nUser:", " Hi\n\nAssistant:", " Bye"],
    "a line that begins like a turn": ["User: specs?\n\nAssistant:", " Here:\nSystem: Linux\nUser: root\n\nUser:",
                                       " go on:\nAssistant: x\n\nAssistant:", " y"],
    "blank lines of blanks": ["User: Hi\n \t\nAssistant:", " Yes\n \nUser:", " Bye"],
    "single line breaks": ["User: Hi\nAssistant:", " Yes\nUser:", " Bye\nAssistant:", " Bye"],
    "single line breaks, the assistant first": ["Assistant:", " Hello\nUser:", " Hi\nAssistant:", " Bye"],
    "emoji": ["User:😀\n\nAssistant:", "😀👩‍👩‍👧\n\nUser:", "🙃\n\nAssistant:", "🙃"],
}


def learnt_by_hand(pieces, lengths):
    """Which tokens hold a byte of an assistant's piece; the 0 at the end belongs to the last piece."""
    flags = [i % 2 == 1 for i, piece in enumerate(pieces) for _ in piece.encode()] + [len(pieces) % 2 == 0]
    ends = np.cumsum(lengths)
    assert ends[-1] == len(flags)
    return [any(flags[end - n: end]) for end, n in zip(ends, lengths, strict=True)]


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_qa_mask(name, world, official):
    pieces = CONVERSATIONS[name]
    for tokenizer in (world, P.ByteTokenizer()):
        rows = loader(["".join(pieces)], tokenizer, loss_mask="qa", dataload="pad")
        tokens = rows.corpus.tokens.tolist()
        lengths = [1] * len(tokens)
        if tokenizer is world:
            lengths = [*(len(official.idx2token[t]) for t in tokens[:-1]), 1]
        assert rows.learnt(0, len(tokens)).tolist() == learnt_by_hand(pieces, lengths)


def test_tokens_do_fuse_across_the_boundary(world):
    # 24281 is `User`, 59 the colon; here the colon is one token with the quotation mark.
    assert world.encode('User:"') == [24281, 720] and world.encode("User: ")[:2] == [24281, 59]
    assert any("。\n" in world.token_bytes(t).decode(errors="replace") for t in world.encode("好。\n\nUser:"))


def test_qa_mask_learns_all_where_there_is_no_role(world):
    rows = loader(["a plain text", "User: Hi\n\nAssistant: Yes"], world, loss_mask="qa", dataload="pad", ctx_len=99)
    first, second = np.split(rows.learnt(0, len(rows.corpus.tokens)), [rows.corpus.starts[1]])
    assert first.all() and not second[:5].any() and second[-1]


def test_a_0_ends_a_turn_too():
    """Some put several conversations into one item of a binidx."""
    for between, after in ((b"\n\n", b""), (b"\n", b""), (b"\n\n", b"\n")):
        text = b"User: a" + between + b"Assistant: b\0" + after + b"User: c" + between + b"Assistant: d\0"
        assert [text[a:b] for a, b in P.learn_assistant(text, P.Config())] == [b" b\0", b" d\0"]


def test_a_document_is_masked_whole_wherever_a_row_cuts_it(world):
    texts = ["".join(pieces) for pieces in CONVERSATIONS.values()]
    rows = loader(texts, world, loss_mask="qa", dataload="pad", ctx_len=4)
    whole = np.concatenate([rows.learnt_of(d) for d in range(len(texts))])
    for start, stop in [*spans(rows), (0, len(whole)), (3, len(whole) - 2)]:
        assert (rows.learnt(start, stop) == whole[start:stop]).all()


def test_mask_none_is_mask_pad():
    for sampler in ("pad", "get"):
        none, pad = (loader(dataload=sampler, loss_mask=mask) for mask in ("none", "pad"))
        assert none.learnt(0, 11).all() and spans(none) == spans(pad)


def test_sft_and_dummy_learn_the_answers_without_being_told():
    assert loader(data_type="sft").mask is loader(data_type="dummy").mask is P.learn_assistant
    assert loader(data_type="jsonl").mask is P.learn_all


# ---------------------------------------------------------------------------------------------------- tokenizers


def random_texts():
    draw = random.Random(0)
    for size in (1, 2, 3, 10, 100, 1000):
        for _ in range(10):
            yield draw.randbytes(size).decode(errors="replace")
            yield draw.randbytes(size).decode("latin-1")
            codes = [draw.randrange(0x30000 - 0x800) for _ in range(size)]
            yield "".join(chr(c if c < 0xD800 else c + 0x800) for c in codes)                # (all but surrogates)


TRICKY = ["", " ", "\n", "\r\n\r\n", "\0", "a\0b", "Hello, world!", "User: 你好。\n\nAssistant: 您好！", "こんにちは",
          "한국어", "👩‍👩‍👧‍👦🇩🇪", "e\u0301 é", "\u2028\u2029\x85\x0b\x0c", "def f(x):\n\treturn x**2  # ²\n",
          "0.1+0.2==0.30000000000000004", " " * 300, "ab" * 300, "\ufeffBOM", "\U0010ffff", "<|endoftext|>", "\\u0041",
          "'\"\\'\\\""]


def test_world_tokenizer_equals_the_official_one(world, official):
    for text in (*TRICKY, *random_texts(), Path(P.__file__).read_text("utf-8")):
        tokens = world.encode(text)
        assert tokens == official.encode(text)
        assert world.decode(tokens) == text
        assert 0 not in tokens


def test_world_tokens_are_the_official_ones(world, official):
    assert world.bytes.keys() - {0} == official.idx2token.keys() == set(range(1, 65530))
    assert all(world.token_bytes(t) == official.idx2token[t] for t in range(1, 65530))
    assert world.token_bytes(0) == b"\0" and world.token_bytes(65535) == b""


def test_a_vocabulary_of_ones_own(tmp_path):
    lines = [f"{i + 1} {bytes([i])!r} 1" for i in range(256)] + ["257 'ab' 2", "258 'é' 2", "259 b'\\xff\\xfe' 2"]
    (tmp_path / "v.txt").write_text("\n".join(lines), "utf-8")
    found = P.load_tokenizer(P.Config(tokenizer="world", vocab_file=str(tmp_path / "v.txt")), 300)
    assert found.encode("aabé") == [ord("a") + 1, 257, 258] and found.token_bytes(259) == b"\xff\xfe"
    assert found.vocab_size == 300
    (tmp_path / "v.txt").write_text("\n".join([*lines, "70000 'abc' 3"]), "utf-8")
    found = P.load_tokenizer(P.Config(tokenizer="world", vocab_file=str(tmp_path / "v.txt")), 70001)
    assert P.from_texts([("x", "abc")], found, "x").tokens.tolist() == [70000, 0]


def test_tokens_that_are_all_learnt_need_no_tokenizer(model_file, tmp_path, monkeypatch, capsys):
    """The tutorial's command, where the package that brings the vocabulary is not installed."""
    monkeypatch.setattr(P.importlib.util, "find_spec", lambda name: None)
    np.save(tmp_path / "x.npy", np.array([1, 65529, 7, 0] * 4, np.uint16))
    model = model_file(n_layer=1, n_embd=64, vocab_size=65536)
    argv = (f"--load_model {model} --data_file {tmp_path}/x.npy --ctx_len 8 --micro_bsz 1 --epoch_steps 1 --op chunk"
            f" --rank 2 --proj_dir {tmp_path}/out").split()
    for more in ("--loss_mask qa", "--sample_prompt Hi", "--tokenizer world"):
        assert P.main([*argv, *more.split()]) == 2 and "`pip install rwkv`" in capsys.readouterr().err
    assert P.main(argv) == 0, capsys.readouterr().err


def test_a_vocabulary_that_tells_no_tokenizer(model_file, tmp_path, capsys):
    """That of the Pile, for one: text is refused and not cut into bytes, which the model has never seen."""
    np.save(tmp_path / "x.npy", np.array([1, 50276, 7, 0] * 4, np.uint16))
    (tmp_path / "x.txt").write_text("some text, longer than a row")
    model = model_file(n_layer=1, n_embd=64, vocab_size=50304)
    argv = (f"--load_model {model} --ctx_len 8 --micro_bsz 1 --epoch_steps 1 --op chunk --rank 2 --proj_dir"
            f" {tmp_path}/out").split()
    for more in (f"--data_file {tmp_path}/x.txt", f"--data_file {tmp_path}/x.npy --sample_prompt Hi", "--chat"):
        assert P.main([*argv, *more.split()]) == 2
        assert "--tokenizer is missing: a vocabulary of 50304 tokens" in capsys.readouterr().err
    assert P.main([*argv, "--data_file", f"{tmp_path}/x.npy"]) == 0, capsys.readouterr().err
    assert isinstance(P.load_tokenizer(P.Config(tokenizer="byte"), 50304), P.ByteTokenizer)
    assert isinstance(P.load_tokenizer(P.Config(), 512), P.ByteTokenizer)


def test_byte_tokenizer():
    byte = P.ByteTokenizer()
    assert byte.encode("aé") == [97, 0xC3, 0xA9] and byte.decode([97, 0xC3, 0xA9]) == "aé"
    assert all(byte.decode(byte.encode(text)) == text for text in TRICKY)


# ------------------------------------------------------------------------------------------------------- readers


def read(path, data_type="", **options):
    found = P.read_corpus(config(data_type=data_type, **options), str(path), P.ByteTokenizer())
    return [bytes(found.tokens[a:b].tolist()) for a, b in zip(found.starts, found.starts[1:], strict=False)]


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_jsonl(tmp_path, newline):
    lines = ['{"text": "ab"}', "", '{"id": 7, "text": "c\\nd"}', '{"text": "\\u00e9"}', '{"text": ""}', "  "]
    (tmp_path / "x.jsonl").write_bytes(newline.join(lines).encode())
    assert read(tmp_path / "x.jsonl") == [b"ab\0", b"c\nd\0", "é\0".encode(), b"\0"]


def test_sft(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"question": " Why? ", "answer": "So.\\n", "id": 1}\n{"question": "Q", "answer": "A"}')
    wanted = [b"User: Why?\n\nAssistant: So.\0", b"User: Q\n\nAssistant: A\0"]
    assert read(path, "sft") == wanted
    path.write_text('{"out": "So.", "in": "Why?"}\n{"in": "Q", "out": "A"}\n')
    assert read(path, "sft", sft_fields=["in", "out"]) == wanted


def test_a_list_of_rows_is_read_as_lines_are(tmp_path):
    rows = [{"question": "Why?", "answer": "So."}, {"question": "Q", "answer": "A"}]
    (tmp_path / "x.json").write_text(json.dumps(rows, indent=1))
    assert read(tmp_path / "x.json", "sft") == [b"User: Why?\n\nAssistant: So.\0", b"User: Q\n\nAssistant: A\0"]
    (tmp_path / "x.json").write_text(json.dumps([{"text": "ab"}, {"text": "c"}]))
    assert P.data_type_of(P.Config(), "x.json") == "jsonl" and read(tmp_path / "x.json") == [b"ab\0", b"c\0"]


def test_rows_without_an_answer_teach_to_say_nothing_and_are_left_out(tmp_path, capsys):
    rows = [("Q", " \n"), ("", "A"), ("Q", "")]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps({"question": q, "answer": a}) + "\n" for q, a in rows))
    assert read(tmp_path / "x.jsonl", "sft") == [b"User: \n\nAssistant: A\0"]
    assert "of 3 rows 2 have no answer; they are left out" in capsys.readouterr().out


def test_sft_of_three_fields_has_a_question_of_two_lines(tmp_path):
    path = tmp_path / "x.jsonl"
    rows = [("Add.", "2 3", "5"), ("Say hi.", " ", "Hi")]
    path.write_text("".join(json.dumps({"instruction": i, "input": x, "output": y}) + "\n" for i, x, y in rows))
    found = read(path, "sft", sft_fields=["instruction", "input", "output"])
    assert found == [b"User: Add.\n2 3\n\nAssistant: 5\0", b"User: Say hi.\n\nAssistant: Hi\0"]


@pytest.mark.parametrize("who, what, user, assistant", [
    ("role", "content", "user", "assistant"), ("from", "value", "human", "gpt"),
    ("from", "value", "User", "Assistant")])
def test_sft_of_one_field_is_a_conversation(tmp_path, who, what, user, assistant):
    said = [("system", "Be\n\nbrief."), (user, "Hi"), (assistant, "Yo"), (user, "2+2?"), (assistant, " 4\n")]
    rows = [{"id": 7, "messages": [{who: w, what: text, "weight": 1} for w, text in talk]}
            for talk in (said, [("system", ""), *said[1:3]])]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    first, second = read(tmp_path / "x.jsonl", "sft", sft_fields=["messages"])
    assert first == b"System: Be\nbrief.\n\nUser: Hi\n\nAssistant: Yo\n\nUser: 2+2?\n\nAssistant: 4\0"
    assert [first[a:b] for a, b in P.learn_assistant(first, P.Config())] == [b" Yo\n\nUser:", b" 4\0"]
    assert second == b"User: Hi\n\nAssistant: Yo\0"                  # who says nothing has no turn


def test_a_blank_line_ends_a_turn_so_sft_has_none_in_one(tmp_path, capsys):
    path = tmp_path / "x.jsonl"
    rows = [("Two:\r\n\r\n1\n2", "One.\n \n\nUser: x\n\nTwo."), ("Q", "A\nB")]
    path.write_text("".join(json.dumps({"question": q, "answer": a}) + "\n" for q, a in rows))
    found = read(path, "sft")
    assert found == [b"User: Two:\n1\n2\n\nAssistant: One.\nUser: x\nTwo.\0", b"User: Q\n\nAssistant: A\nB\0"]
    assert "of 2 rows 1 have blank lines" in capsys.readouterr().out
    assert P.turn("a" + " " * 100_000 + "b\r\nc") == "a" + " " * 100_000 + "b\nc"          # (and that at once)
    assert [found[0][a:b] for a, b in P.learn_assistant(found[0], P.Config())] == [b" One.\nUser: x\nTwo.\0"]


def test_utf8_is_one_document(tmp_path):
    (tmp_path / "x.txt").write_text("a\n\nb é\n", "utf-8")
    assert read(tmp_path / "x.txt") == ["a\n\nb é\n\0".encode()]


def test_a_folder_or_a_pattern_is_read_file_by_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, text in {"b.txt": "B", "a.txt": "A", "c.md": "C", ".hidden.txt": "no", "x.py": "no", "sub/d.txt": "D",
                       "rows/1.jsonl": '{"text": "1"}\n{"text": "2"}', "rows/2.json": '[{"text": "3"}]'}.items():
        (tmp_path / "d" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "d" / name).write_text(text)
    assert read("d") == read("d/") == [b"A\0", b"B\0", b"C\0"]
    assert read("d/*.txt") == [b"A\0", b"B\0"] and read("d/**/*.txt") == [b"A\0", b"B\0", b"D\0"]
    assert read("d/rows") == read("d/rows", "jsonl") == [b"1\0", b"2\0", b"3\0"]
    assert read("d/rows/{1..1}.jsonl") == [b"1\0", b"2\0"]
    Path("d/e.jsonl").write_text('{"question": "Q", "answer": "E"}')
    with pytest.raises(P.Fatal, match="^--data_file d: it holds jsonl and utf-8; set --data_type"):
        read("d")
    assert read("d", "utf-8") == [b"A\0", b"B\0", b"C\0"] and read("d", "sft") == [b"User: Q\n\nAssistant: E\0"]


def test_an_empty_file_among_others_adds_nothing(tmp_path):
    for name, text in {"a.txt": "A", "b.txt": "", "c.txt": "C"}.items():
        (tmp_path / name).write_text(text)
    assert read(tmp_path) == [b"A\0", b"C\0"]
    with pytest.raises(P.Fatal, match="b.txt: holds no text$"):
        read(tmp_path / "b.txt")


def test_which_files_of_a_folder_are_data(tmp_path, monkeypatch):
    """A suffix in capitals is one too; a run's logs are not, or a run whose proj_dir is the folder could not resume."""
    monkeypatch.chdir(tmp_path)
    Path("d[1]{1..2}").mkdir()
    for name in ("A.TXT", "b.txt", "train_log.txt", "loss_data.jsonl"):
        (Path("d[1]{1..2}") / name).write_text(name)
    assert read("d[1]{1..2}") == read("d[1]{1..2}", "utf-8") == [b"A.TXT\0", b"b.txt\0"]
    assert read("d[1]{1..2}/A.TXT") == [b"A.TXT\0"] and read("*/*.txt") == [b"b.txt\0"]


@pytest.mark.parametrize("mark", [b"", b"\xff\xfe"])
def test_utf16le(tmp_path, mark):
    (tmp_path / "x.txt").write_bytes(mark + b"a\0\r\0\n\0\xe9\0" + struct.pack("<2H", 0xD83D, 0xDE00))
    assert read(tmp_path / "x.txt", "utf-16le") == ["a\né😀\0".encode()]
    (tmp_path / "x.txt").write_bytes(b"\xef\xbb\xbfa")
    assert read(tmp_path / "x.txt") == [b"a\0"]


def npy(tokens, letter, byte_order="<", shape=None):
    """A .npy file of version 1.0, byte by byte."""
    head = f"{{'descr': '{byte_order}{letter}', 'fortran_order': False, 'shape': {shape or (len(tokens),)}, }}"
    head = head.ljust(117) + "\n"                                      # (10 + 118 bytes are two times 64)
    code = byte_order + str(len(tokens)) + {"u1": "B", "u2": "H", "i4": "i", "i8": "q", "f4": "f"}[letter]
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(head)) + head.encode() + struct.pack(code, *tokens)


@pytest.mark.parametrize(("letter", "order"), [("u2", "<"), ("i4", "<"), ("i8", ">"), ("u1", "<")])
def test_numpy(tmp_path, letter, order):
    (tmp_path / "x.npy").write_bytes(npy(TOKENS, letter, order))
    found = P.read_corpus(config(), str(tmp_path / "x.npy"), P.ByteTokenizer())
    assert isinstance(found.tokens, np.memmap)
    assert found.tokens.tolist() == TOKENS and found.starts.tolist() == STARTS
    assert P.Loader(found, P.ByteTokenizer(), config(dataload="pad")).batch(0).inputs.tolist() == [[5, 6, 7], [8, 0, 0]]


@pytest.mark.parametrize(("tokens", "starts"), [
    (TOKENS, STARTS), ([7, 0, 0, 65535, 3], [0, 2, 3, 5]), ([1, 2], [0, 2]), ([0], [0, 1]), ([0, 5], [0, 1, 2])])
def test_uint16_and_where_documents_of_a_stream_end(tmp_path, tokens, starts, monkeypatch):
    (tmp_path / "x.bin").write_bytes(struct.pack(f"<{len(tokens)}H", *tokens))
    found = P.read_corpus(config(data_type="uint16"), str(tmp_path / "x.bin"), P.ByteTokenizer(65536))
    assert found.tokens.tolist() == tokens and found.starts.tolist() == starts
    in_twos = [(at, found.tokens[at: at + 2]) for at in range(0, len(tokens), 2)]
    monkeypatch.setattr(P, "pieces", lambda tokens: iter(in_twos))
    assert P.from_stream(found.tokens).starts.tolist() == starts
    with pytest.raises(P.Fatal, match=r"token \d+ "):                 # the largest may be in any piece
        P.read_corpus(config(data_type="uint16"), str(tmp_path / "x.bin"), P.ByteTokenizer(max(tokens)))


def test_a_corpus_is_known_by_its_tokens_and_documents():
    same, other = corpus(), P.Corpus(np.array([*TOKENS[:-2], 8, 0]), corpus().starts)
    wider, shorter = P.Corpus(same.tokens.astype(np.int64), same.starts), P.Corpus(same.tokens[:-1], same.starts)
    assert wider.fingerprint == same.fingerprint                      # whatever type they are of
    assert len({same.fingerprint, other.fingerprint, shorter.fingerprint, corpus(starts=[0, 11]).fingerprint}) == 4


def test_a_long_stream_is_looked_at_in_pieces():
    tokens = np.broadcast_to(np.uint8(3), 2**25 + 5)
    assert [(at, len(piece)) for at, piece in P.pieces(tokens)] == [(0, 2**24), (2**24, 2**24), (2**25, 5)]


@pytest.mark.parametrize(("largest", "vocab_size"), [(9, 256), (255, 256), (256, 512), (50276, 65536), (65529, 65536)])
def test_vocabulary_of_data(tmp_path, capsys, largest, vocab_size):
    (tmp_path / "x.npy").write_bytes(npy([1, largest, 0], "i4"))
    path = str(tmp_path / "x.npy")
    assert P.vocabulary_of_data(config(data_file=path)) == vocab_size
    assert re.match(rf"vocabulary: {vocab_size}, .* is {largest};", capsys.readouterr().out)
    (tmp_path / "y.npy").write_bytes(npy([1, 0], "i4"))
    both = config(data_file=str(tmp_path / "y.npy"), val_file=path)
    assert P.vocabulary_of_data(both) == vocab_size and capsys.readouterr().out
    # Where a flag or the data's type tells, nothing is counted.
    assert P.vocabulary_of_data(config(data_file=path, vocab_size=300)) == 300
    assert P.vocabulary_of_data(config(data_file=path, tokenizer="world")) == 0
    assert P.vocabulary_of_data(config()) == 0 and capsys.readouterr().out == ""


def test_a_new_model_is_as_large_as_its_data(tmp_path, capsys):
    (tmp_path / "x.npy").write_bytes(npy([1, 300, 0] * 9, "i4"))
    words = "--peft none --n_layer 1 --n_embd 64 --op torch --ctx_len 4 --micro_bsz 2 --epoch_steps 1"
    assert P.main([*words.split(), "--data_file", f"{tmp_path}/x.npy", "--proj_dir", f"{tmp_path}/out"]) == 0
    assert torch.load(tmp_path / "out/rwkv-0.pth", weights_only=True)["head.weight"].shape == (512, 64)
    assert "vocabulary: 512" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------------- images


def png(grey):
    """A PNG of 8-bit grey levels, byte by byte."""
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    lines = b"".join(b"\0" + bytes(line) for line in grey)              # (each begins with its filter: none)
    header = struct.pack(">2I5B", len(grey[0]), len(grey), 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")


def tar(path, **files):
    """A tar shard as WebDataset has it: 000.png, 000.txt, 001.png, ..."""
    with tarfile.open(path, "w") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name.replace("_", "."))
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


A, B, C = [[0, 50], [100, 255]], [[9, 8], [7, 0]], [[1, 2], [3, 4]]
TOKENS_OF = {"A": bytes([1, 50, 100, 255, 0]), "B": bytes([9, 8, 7, 1, 0]), "C": bytes([1, 2, 3, 4, 0])}


def test_wds_img_of_one_tar_a_folder_and_patterns(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("d").mkdir()
    tar("d/s-009.tar", a_png=png(A), a_txt=b"a caption", a_json=b"{}", b_PNG=png(B))
    tar("d/s-010.tar", c_png=png(C))
    a, b, c = TOKENS_OF.values()
    assert read("d/s-009.tar", img_side=2) == [a, b]
    for name in ("d", "d/s-*.tar", "d/s-{009..010}.tar"):
        assert P.data_type_of(P.Config(), name) == "wds_img"
        assert read(name, img_side=2) == [a, b, c], name
    assert read("d/s-{010..010}.tar", img_side=2) == [c]
    tar("d/s-011.tar", a_txt=b"a caption")
    assert read("d", img_side=2) == [a, b, c]


def test_wds_img_cuts_scales_and_forgets_colour(tmp_path):
    from PIL import Image

    wide = np.array([[200, 200, 10, 30, 50, 52, 200, 200]] * 2 + [[200, 200, 0, 0, 255, 255, 200, 200]] * 2)
    colour = io.BytesIO()
    Image.new("RGBA", (3, 3), (255, 0, 0, 255)).save(colour, "PNG")
    tar(tmp_path / "x.tar", a_png=png(wide.tolist()), b_png=colour.getvalue())
    red = round(0.299 * 255)                                          # the usual weight of red in grey
    assert read(tmp_path / "x.tar", img_side=2) == [bytes([20, 51, 1, 255, 0]), bytes([red] * 4 + [0])]
    assert len(read(tmp_path / "x.tar")[0]) == 64 * 64 + 1            # unless told otherwise


def test_wds_img_without_pillow(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(P.Fatal, match=r"`pip install Pillow`"):
        read(tmp_path / "x.tar")


def test_dummy_tasks_are_all_different_and_a_function_of_the_seed():
    for family in P.DUMMY:
        tasks = P.dummy_tasks(family, 500, 3)
        assert len({q for q, _ in tasks}) == 500 and tasks == P.dummy_tasks(family, 500, 3)
        assert tasks != P.dummy_tasks(family, 500, 4)
        sums = [(q, a) for q, a in tasks if "+" in q or q.startswith("Add")]
        assert sums and all(int(a.strip(".")) == sum(map(int, "".join(c if c.isdigit() else " " for c in q).split()))
                            for q, a in sums)
    assert not {q for q, _ in P.dummy_tasks("base", 500, 3)} & {q for q, _ in P.dummy_tasks("shift", 500, 3)}


def index(code, itemsize, starts):
    """The bytes of an .idx, field by field."""
    sizes = [b - a for a, b in zip(starts, starts[1:], strict=False)]
    data = b"MMIDIDX\x00\x00" + struct.pack("<Q", 1) + struct.pack("<B", code)
    data += struct.pack("<Q", len(sizes)) + struct.pack("<Q", len(sizes) + 1)
    data += b"".join(struct.pack("<i", n) for n in sizes)
    data += b"".join(struct.pack("<q", a * itemsize) for a in starts[:-1])
    return data + b"".join(struct.pack("<q", i) for i in range(len(sizes) + 1))


@pytest.mark.parametrize(("name", "code", "letter"), [("X_text_document", 4, "i"), ("X", 8, "H"), ("X.1", 5, "q")])
def test_binidx_of_both_writers(tmp_path, name, code, letter):
    tokens = [5, 6, 65529, 8, 0, 5, 6, 0, 9, 7, 0]
    (tmp_path / f"{name}.bin").write_bytes(struct.pack(f"<11{letter}", *tokens))
    (tmp_path / f"{name}.idx").write_bytes(index(code, struct.calcsize(letter), STARTS))
    for suffix in ("", ".bin", ".idx"):
        found = P.read_corpus(config(), str(tmp_path / name) + suffix, P.ByteTokenizer(65536))
        assert found.tokens.tolist() == tokens and found.starts.tolist() == STARTS
        batch = P.Loader(found, P.ByteTokenizer(65536), config(dataload="pad")).batch(0)
        assert batch.inputs.tolist() == [[5, 6, 65529], [8, 0, 0]]


def test_write_binidx_byte_for_byte(tmp_path):
    tokens = [5, 6, 65529, 8, 0, 5, 6, 0, 9, 7, 0]
    P.write_binidx(str(tmp_path / "x"), corpus(tokens))
    assert (tmp_path / "x.bin").read_bytes() == struct.pack("<11H", *tokens)
    assert (tmp_path / "x.idx").read_bytes() == index(8, 2, STARTS)
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(("documents", "said"), [
    ([[5, 6, 0], [7, 8], [9, 0]], ""), ([[5, 6], [7, 8], [9, 0]], "2 of its 3 documents do not end with token 0, by")])
def test_a_binidx_without_ends_is_said_to_be_so(tmp_path, capsys, documents, said):
    """As json2binidx writes it where --append-eod was forgotten."""
    tokens = np.concatenate(documents)
    P.write_binidx(str(tmp_path / "x"), P.Corpus(tokens, np.cumsum([0, *map(len, documents)])))
    found = P.read_binidx(str(tmp_path / "x"), P.ByteTokenizer(), P.Config())
    assert found.tokens.tolist() == tokens.tolist() and found.starts.tolist()[-1] == len(tokens)
    out = capsys.readouterr().out
    assert said in out and bool(out) == bool(said)


def test_make_binidx_of_a_folder_is_beside_it(tmp_path):
    (tmp_path / "rows").mkdir()
    for name in "ab":
        (tmp_path / "rows" / f"{name}.jsonl").write_text(json.dumps({"text": name}))
    assert P.main(["--make_binidx", f"{tmp_path}/rows/", "--tokenizer", "byte"]) == 0
    assert sorted(x.name for x in tmp_path.iterdir()) == ["rows", "rows.bin", "rows.idx"]
    assert read(tmp_path / "rows") == read(f"{tmp_path}/rows/") == [b"a\0", b"b\0"]


def test_make_binidx_is_the_same_corpus_as_its_jsonl(tmp_path, capsys):
    path = tmp_path / "my.data.jsonl"
    texts = ["Hello world", "你好。\n\n😀", "third"]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    assert P.main(["--make_binidx", str(path)]) == 0
    assert "3 documents" in capsys.readouterr().out
    world = P.WorldTokenizer(P.world_vocabulary())
    wanted = P.read_corpus(config(), str(path), world)
    found = P.read_corpus(config(), str(path.with_suffix("")), world)
    assert found.tokens.tolist() == wanted.tokens.tolist() and found.starts.tolist() == wanted.starts.tolist()
    documents = np.split(wanted.tokens, wanted.starts[1:-1])
    assert [world.decode(d[:-1].tolist()) for d in documents] == texts and all(d[-1] == 0 for d in documents)


def test_tokens_beyond_16_bits_are_no_binidx(tmp_path, monkeypatch, capsys):
    tokenizer = P.ByteTokenizer(2**17)
    tokenizer.encode = lambda text: [2**16]
    monkeypatch.setattr(P, "load_tokenizer", lambda cfg, vocab_size: tokenizer)
    (tmp_path / "x.jsonl").write_text('{"text": "a"}')
    assert P.main(["--make_binidx", f"{tmp_path}/x.jsonl"]) == 2
    assert "x.jsonl: token 65536 takes more than 16 bits" in capsys.readouterr().err and len([*tmp_path.iterdir()]) == 1


@pytest.mark.parametrize("name", ["notes.jsonl", "notes.txt.jsonl", "notes.npy.jsonl", "notes.bin.jsonl", "notes.json"])
def test_make_binidx_says_what_to_train_with(tmp_path, capsys, name):
    (tmp_path / name).write_text(json.dumps({"text": "converted"}))
    (tmp_path / "notes.txt").write_text("something else")
    assert P.main(["--make_binidx", str(tmp_path / name), "--tokenizer", "byte"]) == 0
    told = re.search(r"train with --data_file (.*)$", capsys.readouterr().out)[1]
    assert P.read_corpus(P.Config(), told, P.ByteTokenizer()).tokens.tolist() == [*b"converted", 0]


@pytest.mark.parametrize("form", ["{}", "[{}]"])
def test_only_what_is_read_of_a_row_must_be_text(tmp_path, form):
    (tmp_path / "x.jsonl").write_text(form.format(r'{"text": "read", "id": "\ud800"}'))
    found = P.read_corpus(P.Config(), str(tmp_path / "x.jsonl"), P.ByteTokenizer())
    assert found.tokens.tolist() == [*b"read", 0]


def test_what_a_file_is_is_read_off_its_name(tmp_path):
    (tmp_path / "X_text_document.idx").touch()
    names = {"a.jsonl": "jsonl", "a.txt": "utf-8", "a.md": "utf-8", "a.bin": "binidx", "a.idx": "binidx", "": "dummy",
             "a.npy": "numpy", "a.tar": "wds_img", str(tmp_path / "X_text_document"): "binidx"}
    assert {name: P.data_type_of(P.Config(), name) for name in names} == names
    assert P.data_type_of(P.Config(data_type="sft"), "a.jsonl") == "sft"


# --------------------------------------------------------------------------------------------------------- split


@pytest.mark.parametrize("share", [0.01, 0.3, 0.5, 0.99])
def test_split_is_disjoint_and_complete(share):
    text = random_corpus(random.Random(1), 50)
    train, held_out = P.split(text, share)
    assert [*train.tokens, *held_out.tokens] == text.tokens.tolist()
    assert [*train.starts, *(held_out.starts[1:] + train.starts[-1])] == text.starts.tolist()
    assert len(train.starts) > 1 and len(held_out.starts) > 1
    assert abs(len(held_out.tokens) / len(text.tokens) - share) < 12 / len(text.tokens) + 0.02


def test_split_leaves_a_document_to_train_on():
    train, held_out = P.split(corpus(), 0.999)
    assert len(train.starts) == 2 and len(held_out.starts) == 3


def test_split_cuts_one_document_in_two():
    train, held_out = P.split(corpus(starts=[0, 11]), 0.3)
    assert (train.tokens.tolist(), held_out.tokens.tolist()) == (TOKENS[:7], TOKENS[7:])
    assert (train.starts.tolist(), held_out.starts.tolist()) == ([0, 7], [0, 4])
