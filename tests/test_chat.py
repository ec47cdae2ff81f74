"""Talking: what is answered with a carried state is what reading the whole conversation anew would give."""

import io
import os
import pty
import select
import shlex
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import token_by_token
import torch
from conftest import load_model, logits_of, random_model, random_tensors

import pissa_rwkv as P

QUESTIONS = ["Who is there?", "Nobody?", "1+1?"]
GREEDY = P.Config(sample_top_p=0.0, sample_len=7)


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def ask(model, questions, tokenizer=None, cfg=GREEDY):
    """Yields for each question the text before its answer as a document has it, the answer, and the past after it."""
    document, past, draw = "", P.Past(), torch.Generator().manual_seed(0)
    for question in questions:
        document, pieces = document + f"User: {question}\n\nAssistant:", []
        past = P.answer(model, tokenizer or P.ByteTokenizer(), question, past, draw, cfg, pieces.append)
        yield document, "".join(pieces), past
        document += "".join(pieces) + "\n\n"


@pytest.fixture
def written(monkeypatch):
    """The tokens that the model wrote, a list for every question."""
    lists, tokens_of = [], P.tokens_of

    def spy(*inputs):
        lists.append([])
        for new, past in tokens_of(*inputs):
            lists[-1].append(new)
            yield new, past

    monkeypatch.setattr(P, "tokens_of", spy)
    return lists


FORMS = [dict(version="x070"), dict(version="x060", pre_ffn=True), dict(version="x052"), dict(head_qk=16)]


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_every_token_is_the_likeliest_after_the_whole_conversation(form, model_file, written):
    """The whole conversation is read by the token-by-token model. (All of 128 tokens are characters.)"""
    path = model_file(vocab_size=128, dtype=torch.float64, **form)
    tensors, model, read = P.read_pth(path, ""), load_model(path, torch.float64), []
    model.register_forward_pre_hook(lambda model, inputs: read.append(inputs[0].shape[1]))
    for n, (document, said, _) in enumerate(ask(model, QUESTIONS)):
        text = [*document.encode()]
        logits = token_by_token.logits(tensors, text + written[n])
        assert written[n] == logits[len(text) - 1: -1].argmax(-1).tolist()
        assert len(written[n]) == GREEDY.sample_len and bytes(written[n]).decode().startswith(said)
    # What was read once is not read again, but for what of an answer stood behind its last sure beginning.
    assert sum(read) <= len(document) + 2 * GREEDY.sample_len * len(QUESTIONS)


def test_answers_are_the_official_packages(model_file, official):
    path = model_file(vocab_size=128)
    for document, said, _ in ask(load_model(path), QUESTIONS):
        logits, state = official(path, [*document.encode()])
        tokens = []
        while len(tokens) < GREEDY.sample_len:
            tokens.append(int(logits[-1].argmax()))
            logits, state = official(path, tokens[-1:], state)
        assert bytes(tokens).decode().rstrip().startswith(said) and len(said) > 2


# ------------------------------------------------------------------------------------- where an answer ends, by script


WORLD = [" Hi", ".", "\n\n", "User", ":"]


@pytest.mark.parametrize(("script", "answer", "pieces"), [
    (b" Yes.\0", " Yes.", 4),
    (b" Yes. \n\0", " Yes.", 4),
    (b"\0", "", 0),
    (b" 1\n\n2\0", " 1\n\n2", 2),
    (b" 1\n\nUser: what?", " 1", 1),
    (b" 1\nAssistant: 2", " 1", 1),
    (b" 1\n\nUsers do\0", " 1\n\nUsers do", 4),  # (\n\nUsers comes at once)
    (b" 1\n\nUse\0", " 1\n\nUse", 2),
    (" caf\u00e9 \U0001f600!\0".encode(), " caf\u00e9 \U0001f600!", 6),
    (b" \xff?\0", " \ufffd?", 2),
    ([*WORLD, " no"], " Hi.", 2),
    (["a", "\n\nUser", ":\n", "x"], "a", 1),                                              # two lines in a token
    (["a \n\nSys", "tem", ":"], "a", 1),
    ([" \U0001f600".encode()[:3], "\U0001f600".encode()[2:] + b"\n", "\n"], " \U0001f600", 1),
], ids=repr)  # fmt: skip
def test_an_answer_ends_with_the_document_or_where_a_turn_begins(script, answer, pieces, monkeypatch):
    """A model that writes from a script, and keeps as its state what it has read: the document of a conversation."""
    tokens = [bytes([b]) for b in script] if isinstance(script, bytes) else [
        s.encode() if isinstance(s, str) else s for s in script]
    numbers = {b"\0": 0} | {token: n for n, token in enumerate(tokens, 1) if token != b"\0"}

    class Tokenizer(P.ByteTokenizer):
        def encode(self, text):
            return text.encode()

        def token_bytes(self, token):
            return {n: t for t, n in numbers.items()}[token]

    def scripted(model, turn, past, *sampling):
        read = (past.states or b"") + turn
        for token in tokens:
            yield numbers[token], P.Past(read)
            read += token

    monkeypatch.setattr(P, "tokens_of", scripted)
    written, cfg = [], P.Config(sample_len=len(tokens))
    past = P.answer(None, Tokenizer(), "Q", P.Past(), None, cfg, written.append)
    assert "".join(written) == answer and sum(map(bool, written)) == pieces
    document = f"User: Q\n\nAssistant:{answer}"
    assert past.states.decode(errors="replace") + past.unread == f"{document}\n\n"
    assert past.states.startswith(b"User: Q\n\nAssistant:") and b"\0" not in past.states
    for length in range(1, len(tokens)):                              # cut short: what was shown is what is known
        written = []
        past = P.answer(None, Tokenizer(), "Q", P.Past(), None, P.Config(sample_len=length), written.append)
        assert answer.startswith("".join(written))
        document = f"User: Q\n\nAssistant:{''.join(written)}"
        assert past.states.decode(errors="replace") + past.unread == f"{document}\n\n"


def test_ctrl_c_keeps_what_was_shown_and_forgets_a_question_that_was_not_read(monkeypatch):
    def scripted(model, turn, past, *sampling):
        if turn.endswith(b"first?\n\nAssistant:"):
            raise KeyboardInterrupt
        yield ord("a"), P.Past(turn)
        raise KeyboardInterrupt

    class Tokenizer(P.ByteTokenizer):
        def encode(self, text):
            return text.encode()

    monkeypatch.setattr(P, "tokens_of", scripted)
    found = P.answer(None, Tokenizer(), "first?", P.Past("before", None, "x\n\n"), None, GREEDY, str)
    assert found == P.Past("before", None, "x\n\n")
    found = P.answer(None, Tokenizer(), "second?", P.Past(), None, GREEDY, str)
    assert found == P.Past(b"User: second?\n\nAssistant:", None, "a\n\n")


# -------------------------------------------------------------------------------------------------------- how is drawn


@pytest.mark.parametrize(("top_p", "temperature", "wanted"), [
    (1.0, 1.0, [0.1, 0.4, 0.2, 0.3]), (0.6, 1.0, [0, 4 / 7, 0, 3 / 7]), (0.75, 0.5, [0, 16 / 29, 4 / 29, 9 / 29]),
    (0.0, 1.0, [0, 1, 0, 0]), (1.0, 0.001, [0, 1, 0, 0]), (0.4, 9.0, [0, 1, 0, 0])])
def test_the_nucleus_is_cut_first_and_then_warmed(top_p, temperature, wanted):
    """As RWKV's programs do: the likeliest up to top_p, each to the power 1 / temperature."""
    class Model:
        arch, head = SimpleNamespace(vocab_size=4, head_qk=0), SimpleNamespace(weight=torch.zeros(1))

        def __call__(self, tokens, states):
            return tokens, states

        def next_logits(self, x, tokens):
            return torch.tensor([[0.1, 0.4, 0.2, 0.3]]).log()

    tokens = P.tokens_of(Model(), [1], P.Past(), torch.Generator().manual_seed(0), top_p, temperature)
    counts = torch.bincount(torch.tensor([next(tokens)[0] for _ in range(2000)]), minlength=4) / 2000
    assert (counts - torch.tensor(wanted)).abs().max() < 0.04 and not counts[torch.tensor(wanted) == 0].any()


# -------------------------------------------------------------------------------------------------- what is talked to

METHODS = {"pissa": "--quant nf4 --qpissa_iters 2 --train_parts ln head", "lora": "--lora_alpha 32 --rank 7",
           "bone": "--bone_mode bat --quant int8", "state": "--lr_init 1 --quant nf4dq", "none": ""}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat")
    random_model(folder / "m.pth", vocab_size=128)
    (folder / "d.jsonl").write_text('{"text": "User: 2+2?\\n\\nAssistant: 4"}\n' * 4)
    for peft, options in METHODS.items():
        argv = ["--load_model", f"{folder}/m.pth", "--data_file", f"{folder}/d.jsonl", "--proj_dir", f"{folder}/{peft}",
                "--peft", peft, "--rank", "4", "--lr_init", "1e-2", *options.split()]
        assert P.main([*argv, *"--op torch --ctx_len 24 --micro_bsz 2 --epoch_steps 2 --auto_merge".split()]) == 0
    return folder


def loaded(argv):
    return P.load_chat(P.chat_config(cfg := P.parse(argv), P.options_given(argv, cfg.peft)))


def test_what_adapters_saved_again_no_longer_say_their_init_does(place, tmp_path):
    """Else the base would not be held as training held it: merge.py asks both, too."""
    run = f"--load_model {place}/m.pth --data_file {place}/d.jsonl --rank 4 --op torch --ctx_len 24 --epoch_steps 1"
    assert P.main([*run.split(), "--quant", "nf4", "--proj_dir", str(tmp_path)]) == 0
    adapters = tmp_path / "rwkv-0.pth"
    wanted = loaded(["--chat", "--load_model", f"{place}/m.pth", "--adapter_load", str(adapters), "--op", "torch"])[0]
    torch.save(torch.load(adapters), adapters)
    chat = f"--chat --load_model {place}/m.pth --adapter_load {adapters} --rank 4 --op torch"
    found = loaded(chat.split())[0]
    assert torch.equal(*(m.blocks[0].att.key.frozen.codes for m in (wanted, found)))


def test_a_scale_that_no_short_alpha_gives(place, tmp_path):
    tensors, about = P.read_described(place / "lora" / "rwkv-0.pth", "")
    about["scale"] = 32 / 3 / about["rank"]
    P.save(tmp_path / "rwkv-0.pth", tensors, about)
    model, _ = loaded(["--chat", "--load_model", f"{place}/m.pth", "--adapter_load", f"{tmp_path}/rwkv-0.pth", "--op",
                       "torch", "--grad_cp", "auto"])
    assert model.blocks[0].att.key.scale == about["scale"]


@pytest.mark.parametrize("peft", METHODS)
def test_base_and_adapters_are_the_merged_model(peft, place):
    """Nothing but the two files is named: the adapter file tells the rest, and init_pissa.pth lies beside it."""
    adapters, merged = f"{place}/{peft}/rwkv-0.pth", f"{place}/{peft}/rwkv-0-merged.pth"
    argv = ["--chat", "--load_model", f"{place}/m.pth", "--adapter_load", adapters, "--op", "torch"]
    argv, merged = ([*argv, "--peft", "none"], adapters) if peft == "none" else (argv, merged)
    found, wanted, base = (logits_of(m.eval(), [*b"User: 2+2?"])[0] for m in (
        loaded(argv)[0], load_model(merged), load_model(place / "m.pth")))
    assert (found - wanted).abs().max() < 1e-4 * wanted.std() < (wanted - base).abs().max()


def test_a_conversation_begins_with_the_state_that_was_learnt(place):
    argv = ["--chat", "--load_model", f"{place}/m.pth", "--adapter_load", f"{place}/state/rwkv-0.pth", "--op", "torch",
            "--precision", "fp32"]
    document, said, past = next(ask(loaded(argv)[0], QUESTIONS))
    text, base, learnt = f"{document}{said}\n\n".removesuffix(past.unread), load_model(place / "m.pth"), []
    for name in P.adapted(base):                                      # the base was held as nf4dq
        W = base.get_submodule(name).weight
        W.data = P.QUANT["nf4dq"].through(W.data, torch.float32)
    for i in range(2):
        S = P.read_pth(place / "state" / "rwkv-0.pth", "")[f"blocks.{i}.att.time_state"]
        learnt.append(P.BlockState(torch.zeros(1, 64), S[None], torch.zeros(1, 64)))
    (_, wanted), (_, plain) = (logits_of(base, [*text.encode()], states) for states in (learnt, None))
    for mine, state, other in zip(past.states, wanted, plain, strict=True):
        torch.testing.assert_close(mine.wkv, state.wkv, rtol=1e-4, atol=1e-4)
        assert (state.wkv - other.wkv).abs().max() > 1e-2


def test_a_base_alone_may_be_quantised(place):
    argv = ["--chat", "--load_model", f"{place}/m.pth", "--op", "torch", "--quant", "nf4"]
    model, wanted = loaded(argv)[0], load_model(place / "m.pth")
    for name in P.adapted(wanted):
        W = wanted.get_submodule(name).weight
        W.data = P.QUANT["nf4"].through(W.data, torch.float32)
        assert {*dict(model.get_submodule(name).named_buffers())} == {"frozen.codes", "frozen.absmax"}
    torch.testing.assert_close(logits_of(model, [*b"abc"])[0], logits_of(wanted, [*b"abc"])[0])


# ----------------------------------------------------------------------------------------------------------- the loop


def test_lines_come_in_and_answers_go_out(place, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    before = sorted(place.rglob("*"))
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\n\n  \ntwo\n/reset\none\n\u00e9\ntwo\n/exit\nthree\n"))
    argv = ["--load_model", f"{place}/m.pth", "--adapter_load", f"{place}/lora/rwkv-0.pth", "--chat", "--op", "torch"]
    assert P.main([*argv, "--sample_top_p", "0", "--sample_len", "9"]) == 0
    out = capsys.readouterr().out
    one, two, again, outside, two_again, *rest = ["Assistant:" + part for part in out.split("Assistant:")][1:]
    assert not rest and "outside the model's vocabulary of 128" in outside
    assert (one, two) == (again, two_again)
    _, said, _ = next(ask(loaded(argv)[0], ["one"], cfg=P.Config(sample_top_p=0.0, sample_len=9)))
    assert one == f"Assistant:{said}\n"
    assert not [*tmp_path.iterdir()] and sorted(place.rglob("*")) == before
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    assert P.main(argv) == 0                                          # Ctrl-D


@pytest.mark.parametrize("kind, words", [
    ("pissa", "--rank 32"), ("pissa", "--pissa_config '{\"pissa_r\": 32}'"), ("pissa", "--peft lora"),
    ("bone", "--peft disha --disha_config '{\"bone_r\": 32}'")])
def test_what_contradicts_the_adapters_is_refused(kind, words, place, capsys):
    """Also where it is the default."""
    argv = ["--load_model", f"{place}/m.pth", "--adapter_load", f"{place}/{kind}/rwkv-0.pth", "--chat", "--op", "torch"]
    assert P.main([*argv, *shlex.split(words)]) == 2
    assert f"{kind}/rwkv-0.pth was made with " in (said := capsys.readouterr().err) and "leave the flag out" in said


def test_a_command_that_is_none_is_no_question(place, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("/forget\n"))
    assert P.main(["--chat", "--load_model", f"{place}/m.pth", "--op", "torch"]) == 0
    out, err = capsys.readouterr()
    assert not out and "/forget: unknown; choose from /reset and /exit" in err


def test_a_model_that_computes_nan(tmp_path, monkeypatch, capsys):
    """Its numbers are finite, and what it makes of them is not."""
    tensors = random_tensors(vocab_size=128)
    P.save(tmp_path / "m.pth", tensors | {"head.weight": tensors["head.weight"] * 1e38})
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\n"))
    assert P.main(["--load_model", f"{tmp_path}/m.pth", "--chat", "--op", "torch", "--precision", "fp32"]) == 0
    assert "the model computes NaN, not probabilities" in capsys.readouterr().out


def test_bytes_that_are_no_text(place, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff\n"), "utf-8"))
    assert P.main(["--load_model", f"{place}/m.pth", "--chat", "--op", "torch"]) == 2
    assert capsys.readouterr().err.startswith("pissa_rwkv: error: --chat: the question is not valid utf-8 (at 0")


def test_a_question_that_is_no_text_in_a_c_locale(place):
    done = subprocess.run([sys.executable, P.__file__, "--chat", "--load_model", f"{place}/m.pth", "--op", "torch"],
                          input=b"\xff\n", capture_output=True, env=os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0"})
    assert done.returncode == 2 and b"--chat: the question is not valid utf-8" in done.stderr
    assert b"Traceback" not in done.stderr


def test_at_a_terminal_ctrl_c_stops_an_answer_and_then_the_program(place):
    program = [sys.executable, P.__file__, "--chat", "--load_model", f"{place}/m.pth", "--op", "torch",
               "--accelerator", "cpu", "--sample_len", str(10**9)]
    pid, terminal = pty.fork()
    if pid == 0:
        signal.signal(signal.SIGINT, signal.SIG_DFL)                  # (which shells' background jobs ignore)
        os.execv(sys.executable, program)
    seen, status = b"", None

    def read_until(done, seconds):
        """Reads what is printed until done(); whether it was, in so many seconds."""
        nonlocal seen
        deadline = time.monotonic() + seconds
        while not done() and (left := deadline - time.monotonic()) > 0:
            try:
                seen += os.read(terminal, 4096) if select.select([terminal], [], [], min(left, 0.1))[0] else b""
            except OSError:                                           # its end of the terminal is closed: it ends
                time.sleep(0.05)
        return done()

    def ended():
        nonlocal status
        if status is None:
            there, found = os.waitpid(pid, os.WNOHANG)
            status = found if there else None
        return status is not None

    try:
        assert read_until(lambda: b"User: " in seen, 60), seen
        os.write(terminal, b"Hi\n")
        assert read_until(lambda: b"Assistant:" in seen, 60), seen
        os.write(terminal, b"\x03")
        assert read_until(lambda: b"User: " in seen.partition(b"Assistant:")[2], 60), seen
        for _ in range(6):                                            # (Python misses one that comes with the prompt)
            os.write(terminal, b"\x03")
            if read_until(ended, 10):
                break
        assert ended() and os.waitstatus_to_exitcode(status) == 0 and b"Traceback" not in seen, seen
    finally:
        if not ended():
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        os.close(terminal)
