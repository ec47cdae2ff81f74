"""What is written: a .pth as torch.save writes it, a tensor at a time."""

import weakref
import zipfile

import pytest
import torch

import pissa_rwkv as P


def tensors():
    """One of every dtype, and what is not simply a contiguous matrix."""
    draw = torch.Generator().manual_seed(0)
    found = {str(dtype): (9 * torch.randn(7, 5, generator=draw)).to(dtype) for dtype in P.HELD_IN_FILES}
    whole = found["torch.float32"]
    return found | {"turned": whole.T, "part": whole[2:4, 1:], "number": torch.tensor(3), "none": torch.empty(0, 4),
                    "in training": torch.ones(3, requires_grad=True), "twice": whole}


@pytest.mark.parametrize("large", [2**30, 0])
def test_a_file_is_one_of_torch_save(tmp_path, monkeypatch, large):
    monkeypatch.setattr(P, "LARGE", large)
    given = tensors()
    P.save(tmp_path / "ours.pth", given, {"format": 1})
    torch.save({name: t.detach().clone().contiguous() for name, t in given.items()}, tmp_path / "theirs.pth")
    wanted = torch.load(tmp_path / "theirs.pth", weights_only=True)
    for mmap in (False, True):
        found = torch.load(tmp_path / "ours.pth", weights_only=True, mmap=mmap)
        assert [*found] == [*wanted]
        for name, t in found.items():
            assert t.dtype == wanted[name].dtype and torch.equal(t, wanted[name]), name
            assert t.data_ptr() % 64 == 0 or not mmap, name
            assert t.untyped_storage().nbytes() == t.nbytes, name
    ours, theirs = (zipfile.ZipFile(tmp_path / f"{name}.pth") for name in ("ours", "theirs"))
    assert ours.testzip() is None and ours.read("archive/data.pkl") == theirs.read("theirs/data.pkl")
    assert P.read_described(tmp_path / "ours.pth", "")[1] == {"format": 1, "tensors": len(given)}
    P.save(tmp_path / "again.pth", given.items(), {"format": 1})
    assert (tmp_path / "again.pth").read_bytes() == (tmp_path / "ours.pth").read_bytes()


def test_no_two_tensors_need_be_in_memory(tmp_path):
    alive = weakref.WeakSet()

    def made():
        for i in range(5):
            assert not alive
            t = torch.full((4,), float(i))
            alive.add(t)
            yield f"t{i}", t
            del t

    P.save(tmp_path / "x.pth", made())
    assert torch.load(tmp_path / "x.pth")["t4"].tolist() == [4.0] * 4


def test_what_fails_while_it_is_written_leaves_nothing(tmp_path):
    (tmp_path / "x.pth").write_bytes(b"old")

    def broken():
        yield "t", torch.ones(3)
        raise P.Fatal("no more")

    with pytest.raises(P.Fatal, match="no more"):
        P.save(tmp_path / "x.pth", broken())
    assert [p.name for p in tmp_path.iterdir()] == ["x.pth"] and (tmp_path / "x.pth").read_bytes() == b"old"
