# SPDX-License-Identifier: Apache-2.0
"""Golden outputs of the trained demo model, made with HF transformers on the CPU in fp32 (the fp8 folder is dequantised first).
  python3 golden.py MODELS_DIR OUT_DIR [--variants bf16,fp8] [--half public]
MODELS_DIR holds bf16/ and fp8/, as train.py writes them. Writes to OUT_DIR (tests/golden/model):
  prompts.json              every prompt: id, task, text, token ids, expected answer, messages, tools
  <variant>/logits.safetensors      per logits prompt: <id>/top_ids (T,20) int32, <id>/top_logits, <id>/top_logprobs (T,20) fp32, <id>/lse (T,)
  <variant>/greedy.json     64 greedy tokens (stopping after EOS) with logprobs and the gap between the best two logits per step
  <variant>/trace.safetensors       one prompt: all intermediate tensors (see trace())
MTP convention: hidden state AFTER the final norm, eh_proj([enorm(embedding of token i+1), hnorm(hidden i)]), at position i."""
import argparse, json, os, random, shutil, sys, tempfile
sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import numpy as np, torch
from safetensors.numpy import save_file as save_numpy
from safetensors.torch import load_file, save_file
import data as D, model as M

ap = argparse.ArgumentParser()
ap.add_argument("models"); ap.add_argument("out"); ap.add_argument("--variants", default="bf16,fp8"); ap.add_argument("--half", default="public", choices=["public", "heldout"]); ap.add_argument("--threads", type=int, default=2)
a = ap.parse_args(); torch.set_num_threads(a.threads); torch.manual_seed(0)
from transformers import AutoTokenizer, DeepseekV3ForCausalLM
from transformers.modeling_layers import MtpLayer
from transformers.utils import logging as hl
hl.set_verbosity_error()
TOP, NEW = 20, 64
tok = AutoTokenizer.from_pretrained(a.models + "/bf16")


def prompts(half):
    """24 greedy prompts a half (48 in all); the first 12 of a half also give logits. Held-out side of the data split, both halves disjoint."""
    seed = {"public": 1001, "heldout": 2002}[half]
    out, r = [], random.Random(seed)
    plan = ["fact", "talk", "arith", "json", "tool", "copy", "sort", "needle", "count", "spell", "memory", "needle:1200",
            "fact", "capital", "unknown", "arith", "json", "tool", "reverse", "sort", "needle:700", "needle:2600", "needle:4500", "needle:7400"]
    if half == "public":
        for i, ms in enumerate([[D.U("What is MLA?")], [D.U("Hello, how are you?"), D.A("I'm doing great. How can I help you today?"), D.U("I'd like to show off how chat templating works!")]]):
            out.append(dict(task="demo", messages=ms, tools=None, expected=None)); plan = plan[:i] + plan[i + 1:]
    seen = set()
    while plan:
        t, _, n = plan[0].partition(":")
        _, ms, tl = D.eval_conv(r, t, int(n) if n else None)
        key = D.prompt_text(ms, tl)
        import zlib
        if zlib.crc32(key.encode()) % 2 != (half == "heldout") or key in seen: continue      # the halves never share a prompt
        seen.add(key); plan.pop(0)
        out.append(dict(task=t + (":" + n if n else ""), messages=ms[:-1], tools=tl, expected=D.answer_text(ms[-1])))
    for i, p in enumerate(out):
        p["id"] = f"{half[0]}{i:02d}"
        p["text"] = D.prompt_text(p["messages"] + [D.A("")], p["tools"])
        p["ids"] = tok(p["text"], add_special_tokens=False).input_ids
        for m in p["messages"]:                       # OpenAI form
            if m.get("calls"): m["tool_calls"] = [dict(type="function", function=dict(name=n, arguments=x)) for n, x in m["calls"]]
            for k in ("calls", "strip", "w", "forced_think"): m.pop(k, None)
        if p["tools"]: p["tools"] = [dict(type="function", function=x) for x in p["tools"]]
        mt = tok.apply_chat_template(p["messages"], tools=p["tools"], tokenize=False, add_generation_prompt=True)
        p["template_matches"] = mt == p["text"]
    return out


def load(variant):
    st = M.dequant_state(load_file(f"{a.models}/{variant}/model.safetensors"))
    t = tempfile.mkdtemp()
    c = json.load(open(f"{a.models}/{variant}/config.json")); c.pop("quantization_config", None)
    json.dump(c, open(t + "/config.json", "w")); save_file(st, t + "/model.safetensors", metadata={"format": "pt"})
    hf = DeepseekV3ForCausalLM.from_pretrained(t, dtype=torch.float32, attn_implementation="sdpa").eval()
    n = hf.config.num_hidden_layers                   # the MTP module from transformers' own MtpLayer
    p = f"model.layers.{n}."
    mtp = MtpLayer(hf.config, type(hf.model.layers[-1]), type(hf.model.norm), n).float().eval()
    sd = {k[len(p):]: v for k, v in st.items() if k.startswith(p)}
    E = hf.config.n_routed_experts
    new = {"enorm.weight": sd["enorm.weight"], "hnorm.weight": sd["hnorm.weight"], "eh_proj.weight": sd["eh_proj.weight"], "post_norm.weight": sd["shared_head.norm.weight"],
           "mtp_block.mlp.experts.gate_up_proj": torch.stack([torch.cat([sd[f"mlp.experts.{e}.gate_proj.weight"], sd[f"mlp.experts.{e}.up_proj.weight"]]) for e in range(E)]),
           "mtp_block.mlp.experts.down_proj": torch.stack([sd[f"mlp.experts.{e}.down_proj.weight"] for e in range(E)])}
    new.update({"mtp_block." + k: v for k, v in sd.items() if k.startswith(("self_attn", "input_", "post_attention", "mlp.gate", "mlp.shared"))})
    mtp.load_state_dict(new, strict=True)
    shutil.rmtree(t)
    return hf, mtp, sd["shared_head.head.weight"]


def causal(n):
    return torch.full((n, n), float("-inf")).triu(1)[None, None]


@torch.no_grad()
def mtp_logits(hf, mtp, head, hidden, ids, zero_first, want=None):
    """hidden (1,T,H), ids (1,T+1) -> logits (T,V) for token i+2"""
    T = hidden.shape[1]
    e = hf.model.embed_tokens(ids[:, 1:T + 1]).clone()
    if zero_first: e[:, 0] = 0
    pos = torch.arange(T)[None]
    x = mtp(e, hidden, hf.model.rotary_emb(e, position_ids=pos), causal(T), pos, None)
    return torch.nn.functional.linear(x, head)[0]


@torch.no_grad()
def greedy(hf, ids):
    x, past, out = torch.tensor([ids]), None, []
    for _ in range(NEW):
        o = hf(x, past_key_values=past, use_cache=True, logits_to_keep=1); past = o.past_key_values
        lg = o.logits[0, -1].float(); lp = lg.log_softmax(-1); t2 = lg.topk(2)
        n = int(t2.indices[0]); out.append((n, float(lp[n]), float(t2.values[0] - t2.values[1])))
        if n == 1: break
        x = torch.tensor([[n]])
    return out


@torch.no_grad()
def trace(hf, mtp, head, ids):
    """Everything for one prompt (T tokens; the last one is only the MTP module's 'next token'):
    embed, layer<i>_out (residual stream), layer<i>_attn_out, layer<i>_mlp_out, layer<i>_c_kv (after kv_a_layernorm: what the cache holds),
    layer<i>_k_pe (after RoPE; HF order: the 32 even channels' results, then the 32 odd ones'), layer<i>_router_logits, layer<i>_router_scores
    (sigmoid), layer<i>_experts (sorted), layer<i>_expert_weights (same order), final_hidden (after norm), logits, mtp_* for the MTP layer
    (embedding not zeroed) and mtp_logits_zero_first (embedding at position 0 zeroed, as vLLM does)."""
    T = {}; hooks = []
    def cap(name, f):
        return lambda m, i, o: T.__setitem__(name, f(i, o)) if name not in T else None
    layers = [(f"layer{i}", l) for i, l in enumerate(hf.model.layers)] + [("mtp", mtp.mtp_block)]
    first = lambda o: (o[0] if isinstance(o, tuple) else o)[0]
    for n, l in layers:
        hooks.append(l.register_forward_hook(cap(n + "_out", lambda i, o: first(o))))
        hooks.append(l.self_attn.register_forward_hook(cap(n + "_attn_out", lambda i, o: first(o))))
        hooks.append(l.mlp.register_forward_hook(cap(n + "_mlp_out", lambda i, o: first(o))))
        hooks.append(l.self_attn.kv_a_layernorm.register_forward_hook(cap(n + "_c_kv", lambda i, o: o[0])))
        hooks.append(l.self_attn.kv_a_proj_with_mqa.register_forward_hook(cap(n + "_kv_a", lambda i, o: o[0])))
        hooks.append(l.self_attn.q_b_proj.register_forward_hook(cap(n + "_q", lambda i, o: o[0])))
        if hasattr(l.mlp, "gate") and hasattr(l.mlp, "experts"): hooks.append(l.mlp.gate.register_forward_hook(cap(n + "_gate", lambda i, o: o)))
    x = torch.tensor([ids[:-1]])
    o = hf.model(x)
    T["embed"], T["final_hidden"] = hf.model.embed_tokens(x)[0], o.last_hidden_state[0]
    T["logits"] = hf.lm_head(o.last_hidden_state)[0]
    full = torch.tensor([ids])
    T["mtp_logits"] = mtp_logits(hf, mtp, head, o.last_hidden_state, full, False)
    for h in hooks: h.remove()
    T["mtp_logits_zero_first"] = mtp_logits(hf, mtp, head, o.last_hidden_state, full, True)
    R = hf.config.kv_lora_rank
    pos = torch.arange(len(ids) - 1)[None]; cos, sin = hf.model.rotary_emb(x.float(), position_ids=pos); cos, sin = cos[0, :, :32], sin[0, :, :32]
    for n, l in layers:
        k = T.pop(n + "_kv_a")[:, R:]; p, q = k[:, 0::2], k[:, 1::2]
        T[n + "_k_pe"] = torch.cat([p * cos - q * sin, q * cos + p * sin], -1); T[n + "_c_kv"] = T[n + "_c_kv"].reshape(len(ids) - 1, R)
        g = T.pop(n + "_gate", None)
        if g is not None:
            T[n + "_router_logits"], T[n + "_router_scores"] = g[0], g[0].sigmoid()
            ix, od = g[2].sort(-1); T[n + "_experts"], T[n + "_expert_weights"] = ix.int(), g[1].gather(1, od)
    T["ids"] = full[0].int()
    return {k: v.numpy().astype(np.int32 if v.dtype in (torch.int32, torch.int64) else np.float32) for k, v in T.items()}


def save(path, arrays, metadata=None):
    save_numpy({k: np.ascontiguousarray(v).reshape(np.shape(v) or (1,)) for k, v in arrays.items()}, path, metadata)


half = a.half
ps = prompts(half)
os.makedirs(a.out, exist_ok=True)
json.dump([{k: p[k] for k in ("id", "task", "messages", "tools", "text", "ids", "expected", "template_matches")} for p in ps], open(f"{a.out}/prompts.json", "w"), ensure_ascii=False, indent=1)
assert all(p["template_matches"] for p in ps), [p["id"] for p in ps if not p["template_matches"]]
for v in a.variants.split(","):
    hf, mtp, head = load(v); od = f"{a.out}/{v}"; os.makedirs(od, exist_ok=True)
    gr, z, acc = {}, {}, [0, 0]
    for i, p in enumerate(ps):
        g = greedy(hf, p["ids"]); t = [x[0] for x in g]
        text = tok.decode([x for x in t if x != 1], skip_special_tokens=False)
        gr[p["id"]] = dict(task=p["task"], prompt_tokens=len(p["ids"]), tokens=t, logprobs=[round(x[1], 6) for x in g], gaps=[round(x[2], 5) for x in g], text=text, finished=t[-1] == 1, expected=p["expected"],
                           matches=None if p["expected"] is None else (text == p["expected"] if t[-1] == 1 else p["expected"].startswith(text)))
        with torch.no_grad():                                     # what a draft of one token would have been, for every step
            full = p["ids"] + t; h = hf.model(torch.tensor([full[:-1]])).last_hidden_state
            d = mtp_logits(hf, mtp, head, h, torch.tensor([full]), False).argmax(-1).tolist()[len(p["ids"]) - 1:-1]
        gr[p["id"]]["mtp_draft"] = d; acc[0] += sum(x == y for x, y in zip(d, t[1:])); acc[1] += len(t) - 1
        if i < 12:
            with torch.no_grad(): lg = hf(torch.tensor([p["ids"]])).logits[0].float()
            s = slice(None) if lg.shape[0] <= 1500 else slice(-256, None)
            lp = lg.log_softmax(-1)[s]; tk = lg[s].topk(TOP, -1)
            z[p["id"] + "/first_position"] = np.int32(0 if s.start is None else lg.shape[0] - 256)
            z[p["id"] + "/top_ids"], z[p["id"] + "/top_logits"], z[p["id"] + "/top_logprobs"], z[p["id"] + "/lse"] = tk.indices.numpy().astype(np.int32), tk.values.numpy(), lp.gather(1, tk.indices).numpy(), lg[s].logsumexp(-1).numpy()
    json.dump(gr, open(od + "/greedy.json", "w"), ensure_ascii=False, indent=1); save(od + "/logits.safetensors", z)
    pick = next(p for p in ps if p["task"] in ("json", "arith") and 15 < len(p["ids"]) < 90)
    tr = trace(hf, mtp, head, pick["ids"] + gr[pick["id"]]["tokens"][:40]); save(od + "/trace.safetensors", tr, {"prompt_id": pick["id"]})
    m = [x["matches"] for x in gr.values() if x["matches"] is not None]
    print(half, v, f"{len(gr)} greedy, {sum(m)}/{len(m)} match the expected answer, mtp accepts {acc[0]}/{acc[1]}, trace {tr['logits'].shape}", flush=True)
