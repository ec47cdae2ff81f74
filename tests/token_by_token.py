"""An oracle: RWKV-5, 6 and 7 written one token and one head at a time, over a file's dict of tensors.

Shares no code with the project, and no shortcuts: autograd differentiates what is here.
"""

import math

import torch
from torch import Tensor


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    return (x - x.mean()) / ((x - x.mean()).square().mean() + eps).sqrt() * weight + bias


def logits(t: dict[str, Tensor], tokens: list[int]) -> Tensor:
    """(T,V) for one text."""
    n_layer = 1 + max(int(name.split(".")[1]) for name in t if name.startswith("blocks."))
    memory: list[dict[str, Tensor]] = [{} for _ in range(n_layer)]
    out, hidden = [], []
    for token in tokens:
        x = layer_norm(t["emb.weight"][token], t["blocks.0.ln0.weight"], t["blocks.0.ln0.bias"])
        v_first = None
        for i in range(n_layer):
            p = {name.removeprefix(f"blocks.{i}."): w for name, w in t.items() if name.startswith(f"blocks.{i}.")}
            h = layer_norm(x, p["ln1.weight"], p["ln1.bias"])
            if "ffnPre.key.weight" in p:
                x = x + channel_mix(part(p, "ffnPre."), h, memory[i].get("h", torch.zeros_like(h)))
            else:
                y, v_first = time_mix(part(p, "att."), h, memory[i], v_first)
                x = x + y
            h2 = layer_norm(x, p["ln2.weight"], p["ln2.bias"])
            x = x + channel_mix(part(p, "ffn."), h2, memory[i].get("h2", torch.zeros_like(h2)))
            memory[i] |= {"h": h, "h2": h2}
        z = layer_norm(x, t["ln_out.weight"], t["ln_out.bias"])
        hidden.append(z)
        out.append(t["head.weight"] @ z)
        if "head_q.weight" in t:
            votes = [(t["head_q.weight"] @ z) @ (t["head_k.weight"] @ s) / len(t["head_q.weight"]) for s in hidden]
            for earlier, vote in zip(tokens, votes, strict=False):
                out[-1] = out[-1] + vote * torch.nn.functional.one_hot(torch.tensor(earlier), len(out[-1]))
    return torch.stack(out)


def part(p: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): w.reshape([n for n in w.shape if n > 1] or [1]) if w.dim() == 3 and
            w.shape[0] == 1 else w for name, w in p.items() if name.startswith(prefix)}


def channel_mix(p: dict[str, Tensor], h: Tensor, before: Tensor) -> Tensor:
    if "x_k" in p:
        k = p["key.weight"] @ (h + (before - h) * p["x_k"])
        return p["value.weight"] @ k.clamp(min=0).square()
    if "time_maa_k" in p:
        x_k, x_r = (h + (before - h) * p[f"time_maa_{m}"] for m in "kr")
    else:
        x_k, x_r = (h * p[f"time_mix_{m}"] + before * (1 - p[f"time_mix_{m}"]) for m in "kr")
    k = p["key.weight"] @ x_k
    return (p["receptance.weight"] @ x_r).sigmoid() * (p["value.weight"] @ k.clamp(min=0).square())


def time_mix(p: dict[str, Tensor], h: Tensor, memory: dict[str, Tensor], v_first: Tensor | None) -> tuple:
    before = memory.get("h", torch.zeros_like(h))
    H, N = p["r_k" if "r_k" in p else "time_faaaa"].shape
    S = memory.get("S", [p["time_state"][i] if "time_state" in p else h.new_zeros(N, N) for i in range(H)])
    heads = [slice(i * N, i * N + N) for i in range(H)]
    y, after = [], []
    if "r_k" in p:
        r, w, k, v, a, g = (h + (before - h) * p[f"x_{m}"] for m in "rwkvag")
        r, k = p["receptance.weight"] @ r, p["key.weight"] @ k
        value = p["value.weight"] @ v
        d = torch.exp(-math.exp(-0.5) / (1 + torch.exp(-(p["w0"] + torch.tanh(w @ p["w1"]) @ p["w2"]))))
        rate = (p["a0"] + a @ p["a1"] @ p["a2"]).sigmoid()
        gate = (g @ p["g1"]).sigmoid() @ p["g2"]
        if v_first is None:
            v_first = value
        else:
            value = value + (v_first - value) * (p["v0"] + v @ p["v1"] @ p["v2"]).sigmoid()
        for i, c in enumerate(heads):
            removal = (k * p["k_k"])[c] / (k * p["k_k"])[c].norm().clamp(min=1e-12)
            key = (k * (1 + (rate - 1) * p["k_a"]))[c]
            new = S[i] @ torch.diag(d[c]) - torch.outer(S[i] @ removal, removal * rate[c]) + torch.outer(value[c], key)
            read = group_norm(new @ r[c], p, c)
            y.append(read + (r[c] * key * p["r_k"][i]).sum() * value[c])
            after.append(new)
        memory["S"] = after
        return p["output.weight"] @ (torch.cat(y) * gate), v_first
    if "time_maa_x" in p:
        mixed = h + (before - h) * p["time_maa_x"]
        rank = p["time_maa_w2"].shape[1]
        low = torch.tanh(mixed @ p["time_maa_w1"])
        x = {m: h + (before - h) * (p[f"time_maa_{m}"] + low[f * rank: f * rank + rank] @ p["time_maa_w2"][f])
             for f, m in enumerate("wkvrg")}
        w = p["time_decay"] + torch.tanh(x["w"] @ p["time_decay_w1"]) @ p["time_decay_w2"]
    else:
        x = {m: h * p[f"time_mix_{m}"] + before * (1 - p[f"time_mix_{m}"]) for m in "kvrg"}
        w = p["time_decay"].reshape(-1)
    r, k, value = (p[f"{name}.weight"] @ x[name[0]] for name in ("receptance", "key", "value"))
    g = p["gate.weight"] @ x["g"]
    for i, c in enumerate(heads):
        bonus = torch.outer(value[c], p["time_faaaa"][i] * k[c])
        y.append(group_norm((S[i] + bonus) @ r[c], p, c))
        after.append(S[i] @ torch.diag(torch.exp(-torch.exp(w[c]))) + torch.outer(value[c], k[c]))
    memory["S"] = after
    return p["output.weight"] @ (torch.cat(y) * g * g.sigmoid()), None


def group_norm(x: Tensor, p: dict[str, Tensor], channels: slice) -> Tensor:
    return layer_norm(x, p["ln_x.weight"][channels], p["ln_x.bias"][channels], 64e-5)
