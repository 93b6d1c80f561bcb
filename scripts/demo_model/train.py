# SPDX-License-Identifier: Apache-2.0
"""Train the latentd demo model from scratch inside a wall-clock budget, export it and evaluate it.
  python3 train.py --minutes 8 --out DIR"""
import argparse, json, math, os, random, sys, time
T0 = time.time()
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
HERE = os.path.dirname(os.path.abspath(__file__)); sys.path.insert(0, HERE)
import numpy as np, torch, torch.nn.functional as F
from tokenizers import Tokenizer
import data as D, model as M

ap = argparse.ArgumentParser()
ap.add_argument("--minutes", type=float, default=8.0, help="whole program: start, training, export, evaluation")
ap.add_argument("--reserve", type=float, default=85.0, help="seconds kept for export and evaluation")
ap.add_argument("--out", default=os.environ.get("OUT", "out"))
ap.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
ap.add_argument("--rows", type=int, default=32); ap.add_argument("--len", type=int, default=1024)
ap.add_argument("--long", default="2048x8:.45,4096x4:.3,8192x2:.25"); ap.add_argument("--long_every", type=float, default=0.35)
ap.add_argument("--workers", type=int, default=max(2, (os.cpu_count() or 2) - 3)); ap.add_argument("--max_steps", type=int, default=10**9)
ap.add_argument("--muon_lr", type=float, default=4e-3); ap.add_argument("--adam_lr", type=float, default=2e-3)
ap.add_argument("--warmup", type=int, default=100)
ap.add_argument("--wd", type=float, default=0.05); ap.add_argument("--hold", type=float, default=0.4, help="share of the time at the full rate")
ap.add_argument("--qat", type=float, default=0.8, help="fake-quantise from this share of the time on")
ap.add_argument("--mtp_w", type=float, default=0.3); ap.add_argument("--seed", type=int, default=1)
ap.add_argument("--eval_n", type=int, default=64); ap.add_argument("--eval_long", type=int, default=16)
a = ap.parse_args()
DEADLINE = T0 + a.minutes * 60
TRAIN_END = DEADLINE - a.reserve
dev, cuda = torch.device(a.device), a.device.startswith("cuda")
dt = torch.bfloat16 if cuda else torch.float32
os.makedirs(a.out, exist_ok=True)
LOG = open(a.out + "/train.log", "w")
def log(*x):
    s = f"[{time.time()-T0:6.1f}s] " + " ".join(map(str, x)); print(s, flush=True); LOG.write(s + "\n"); LOG.flush()

TOK = HERE + "/../../deploy/demo-model"                      # its tokenizer; make_tok.py makes a new one
LONG = [(int(s.split("x")[0]), int(s.split("x")[1].split(":")[0]), float(s.split(":")[1])) for s in a.long.split(",")]


class Shorts(torch.utils.data.IterableDataset):
    def __init__(self, seed): self.seed = seed
    def it(self, r, enc):
        while True: yield tuple(torch.from_numpy(x) for x in D.short_batch(r, enc, a.rows, a.len))
    def __iter__(self):
        wi = torch.utils.data.get_worker_info()
        torch.set_num_threads(1)
        r = random.Random(f"{a.seed}-{self.seed}-{wi.id if wi else 0}")
        return self.it(r, D.Encoder(Tokenizer.from_file(TOK + "/tokenizer.json")))
class Longs(Shorts):
    def it(self, r, enc):
        while True:
            L, B, _ = r.choices(LONG, [x[2] for x in LONG])[0]
            yield tuple(torch.from_numpy(x) for x in D.long_batch(r, enc, B, L))

def loader(cls, w):
    kw = dict(prefetch_factor=4, persistent_workers=True, multiprocessing_context="fork") if w else {}
    return iter(torch.utils.data.DataLoader(cls(cls.__name__), batch_size=None, num_workers=w, pin_memory=cuda, **kw))


def ns5(G):
    """Newton-Schulz orthogonalisation of a stack of matrices"""
    X = G.to(torch.bfloat16 if cuda else torch.float32)
    t = X.shape[-2] > X.shape[-1]
    if t: X = X.mT
    X = X / (X.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        A = X @ X.mT
        X = 3.4445 * X + (-4.7750 * A + 2.0315 * (A @ A)) @ X
    return X.mT if t else X

class Muon:
    def __init__(self, ps, mom=0.95):
        self.g = {}
        for p in ps: self.g.setdefault(p.shape[-2:], []).append(p)
        self.mom, self.buf = mom, {}
    @torch.no_grad()
    def step(self, lr, wd):
        for sh, ps in self.g.items():
            G = torch.cat([p.grad.reshape(-1, *sh) for p in ps])
            b = self.buf.setdefault(sh, torch.zeros_like(G))
            b.mul_(self.mom).add_(G, alpha=1 - self.mom)
            u = ns5(G.lerp(b, self.mom)).float() * (0.2 * max(sh) ** 0.5)
            us, o = [], 0
            for p in ps:
                n = p.numel() // (sh[0] * sh[1]); us.append(u[o:o+n].view(p.shape)); o += n
            torch._foreach_mul_(ps, 1 - lr * wd)
            torch._foreach_add_(ps, us, alpha=-lr)


def losses(model, ids, w, pos, mask, valid, same1, same2, W):
    """(main + mtp loss) / W; targets across document borders are masked by same1/same2"""
    h = model(ids, pos, mask, dt, valid=valid)
    tgt1, w1 = ids.roll(-1, 1), w.roll(-1, 1) * same1
    ce = F.cross_entropy(model.logits(h).flatten(0, 1).float(), tgt1.flatten(), reduction="none")
    l1 = (ce * w1.flatten()).sum()
    zero = (pos.expand_as(ids) == 0) & (torch.rand(ids.shape, device=ids.device) < 0.5)   # vLLM zeroes it, HF and SGLang do not: learn both
    h2 = model.mtp_hidden(h, tgt1, pos, mask, dt, zero, valid=valid)
    tgt2, w2 = ids.roll(-2, 1), w.roll(-2, 1) * same2
    ce2 = F.cross_entropy(model.logits(h2).flatten(0, 1).float(), tgt2.flatten(), reduction="none")
    l2 = (ce2 * w2.flatten()).sum()
    return (l1 + a.mtp_w * l2) / W, l1.detach(), l2.detach()

def prep_short(b):
    ids, w, doc, pos = [x.to(dev, non_blocking=True) for x in b]
    ids, pos = ids.long(), pos.long()
    L = ids.shape[1]
    tri = torch.ones(L, L, dtype=torch.bool, device=dev).tril()
    m = (doc[:, :, None] == doc[:, None, :]) & tri
    m = torch.zeros(m.shape, dtype=dt, device=dev).masked_fill_(~m, float("-inf"))[:, None]
    ar = torch.arange(L, device=dev)
    s1, s2 = (doc == doc.roll(-1, 1)) & (ar < L - 1) & (doc > 0), (doc == doc.roll(-2, 1)) & (ar < L - 2) & (doc > 0)
    return ids, w, pos, m, (doc > 0).float(), s1, s2
def prep_long(b):
    ids, w = [x.to(dev, non_blocking=True) for x in b]
    ids, L = ids.long(), ids.shape[1]
    ar = torch.arange(L, device=dev)
    ok = w > 0
    return ids, w * 3.0, ar[None], None, (ids != 2).float(), (ar < L - 1)[None].expand_as(ok), (ar < L - 2)[None].expand_as(ok)


def selftest(model, b):
    """every kind of step once before the clock matters: packed and causal attention agree, both fake-quant modes, decoding"""
    t, L = time.time(), 256
    ids = b[0][:2, :L].to(dev).long(); pos = torch.arange(L, device=dev)[None]
    m = torch.zeros(2, 1, L, L, dtype=dt, device=dev).masked_fill_(~torch.ones(L, L, dtype=torch.bool, device=dev).tril(), float("-inf"))
    with torch.no_grad(): d = (model(ids, pos, m, dt).float() - model(ids, pos, None, dt).float()).abs().mean()
    msg = f"selftest: packed against causal attention, mean difference {float(d):.5f}"
    for w, ac in ((False, False), (True, False), (True, True)):
        try:
            M.Quant.weights, M.Quant.acts = w, ac
            one = torch.ones_like(ids, dtype=torch.bool); one[:, -2:] = False
            loss, *_ = losses(model, ids, one.float(), pos, m, one.float(), one, one, torch.tensor(float(ids.numel()), device=dev))
            loss.backward(); g = sum(float(p.grad.float().square().sum()) for p in model.parameters() if p.grad is not None) ** .5
            msg += f"; quant {int(w)}{int(ac)} loss {float(loss.detach()):.3f} grad {g:.2f}"
            if not math.isfinite(g): raise RuntimeError("gradient is not finite")
        except Exception as e:
            if not w: raise
            a.qat = 9.0; msg += f"; fake quantisation off: {e!r}"
        model.zero_grad(set_to_none=True)
    M.Quant.weights = M.Quant.acts = False
    model.eval()
    try: generate(model, None, [ids[0, :50].tolist(), ids[1, :80].tolist()], [4, 6]); msg += "; decode ok"
    except Exception as e: msg += f"; decode fails: {e!r}"
    model.train()
    for x in model.modules():
        if isinstance(x, M.MoE): x.load.zero_()
    log(msg + f" ({time.time()-t:.1f}s)")


def train():
    wl = 0 if a.workers == 0 else max(1, a.workers // 4)
    S, L = loader(Shorts, max(0, a.workers - wl)), loader(Longs, wl)     # forked before CUDA starts
    torch.manual_seed(a.seed)
    model = M.Model().to(dev)
    if cuda:
        torch.backends.cuda.enable_cudnn_sdp(False)
    mats, rest = [], []
    for n, p in model.named_parameters():
        (rest if p.ndim < 2 or n in ("embed", "head") or n.endswith("gate") else mats).append(p)
    muon = Muon(mats)
    adam = torch.optim.AdamW([dict(params=[p for p in rest if p.ndim > 1], lr=a.adam_lr, weight_decay=0.0), dict(params=[p for p in rest if p.ndim < 2], lr=a.adam_lr * .5, weight_decay=0.0)],
                             betas=(0.9, 0.98), eps=1e-9, fused=cuda)
    base = [g["lr"] for g in adam.param_groups]
    log(f"parameters {sum(p.numel() for p in model.parameters())/1e6:.2f}M, device {dev}, workers {a.workers}")
    moes = [m for m in model.modules() if isinstance(m, M.MoE)]
    rr, step, tok, ntok_log, tl, acc = random.Random(7), 0, 0, 0, time.time(), []
    t_start = time.time(); hist = []; snap, cut = None, 1.0
    model.train(); selftest(model, next(S)); t_start = tl = time.time()
    try:
        while True:
            p = (time.time() - t_start) / max(1.0, TRAIN_END - t_start)
            if p >= 1 or step >= a.max_steps: break
            lr = min(1.0, (step + 1) / a.warmup) * (1.0 if p < a.hold else 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (p - a.hold) / (1 - a.hold))))
            M.Quant.weights = p > a.qat; M.Quant.acts = p > a.qat and step % 2 == 0
            micro = [prep_short(next(S))]
            if rr.random() < a.long_every and p > 0.03: micro.append(prep_long(next(L)))
            W = sum((m[1].roll(-1, 1) * m[5]).sum() for m in micro)
            for i, m in enumerate(micro):
                loss, l1, l2 = losses(model, *m, W)
                loss.backward()
                tok += m[0].numel()
                if i == 0: ws = (m[1].roll(-1, 1) * m[5]).sum(); acc.append(torch.stack([l1 / ws, l2 / ws]))
                else: acc_long = l1 / (m[1].roll(-1, 1) * m[5]).sum(); hist.append(acc_long)
            gn = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True, error_if_nonfinite=False)
            muon.step(a.muon_lr * lr * cut, a.wd)
            for g, bl in zip(adam.param_groups, base): g["lr"] = bl * lr * cut
            adam.step()
            with torch.no_grad():
                for m in moes:
                    m.bias += 1e-3 * lr * torch.sign(m.load.mean() - m.load); 
                    if step % 200 == 199: m.last = (m.load / m.load.mean()).max()
                    m.load.zero_()
            model.zero_grad(set_to_none=True)
            step += 1
            if step % (200 if cuda else 5) == 0:
                x = torch.stack(acc).mean(0).tolist(); lg = torch.stack(hist[-50:]).mean().item() if hist else float("nan")
                now = time.time()
                log(f"step {step} p {p:.2f} lr {lr:.3f} loss {x[0]:.4f} mtp {x[1]:.4f} long {lg:.4f} gn {float(gn):.2f} load {max(float(getattr(m,'last',0)) for m in moes):.2f} {(tok-ntok_log)/(now-tl)/1e3:.0f}k tok/s {(now-t_start)/step*1e3:.0f} ms/step" + (" qat" if M.Quant.weights else ""))
                acc, tl, ntok_log = [], now, tok
                if len(hist) > 200: hist = hist[-60:]
                with torch.no_grad():
                    sd = model.state_dict()
                    if math.isfinite(x[0]) and all(bool(torch.isfinite(v).all()) for v in sd.values()): snap = {k: v.clone() for k, v in sd.items()}
                    else:
                        log("not finite: back to the last snapshot at half the rate"); cut *= 0.5
                        if snap: model.load_state_dict(snap)
                        muon.buf.clear(); adam.state.clear(); hist = []
    except Exception:
        import traceback; log("training stopped early", traceback.format_exc())
        if snap: model.load_state_dict(snap)
    log(f"trained {step} steps, {tok/1e6:.1f}M tokens")
    M.Quant.weights = M.Quant.acts = False
    for it in (S, L):
        if hasattr(it, "_shutdown_workers"): it._shutdown_workers()
    return model.eval(), dict(steps=step, tokens=tok, train_seconds=time.time() - t_start)


def export(model):
    """DIR/bf16 and DIR/fp8: two checkpoints as Hugging Face lays them out, with the MTP layer's own copies of embedding and head."""
    st = M.hf_state(model)
    for name, s, f in (("bf16", st, False), ("fp8", M.fp8_state(st), True)): M.write_dir(f"{a.out}/{name}", s, f, TOK)
    log("exported", a.out + "/bf16", a.out + "/fp8")


@torch.no_grad()
def generate(model, tok, items, maxnew, deadline=float("inf")):
    """items: list of token lists, right-padded batch; greedy; -> list of token lists"""
    B, ln = len(items), torch.tensor([len(x) for x in items], device=dev)
    Lp, Lm = int(ln.max()), int(ln.max()) + max(maxnew) + 1
    ids = torch.full((B, Lp), 2, dtype=torch.long, device=dev)
    for i, x in enumerate(items): ids[i, :len(x)] = torch.tensor(x, device=dev)
    h = model.layers[0].self_attn.h
    ca = [(torch.zeros(B, h, Lm, 192, dtype=dt, device=dev), torch.zeros(B, h, Lm, 128, dtype=dt, device=dev)) for _ in model.layers]
    rows = torch.arange(B, device=dev)[:, None]
    last = torch.empty(B, 256, dtype=dt, device=dev)
    ck = max(1, 65536 // Lp)
    for s in range(0, B, ck):
        e = min(B, s + ck); c = torch.arange(Lp, device=dev)[None]
        hs = model(ids[s:e], None, None, dt, [(K, V, rows[s:e], c) for K, V in ca])
        last[s:e] = hs[torch.arange(e - s, device=dev), ln[s:e] - 1]
    out = torch.full((B, max(maxnew)), 1, dtype=torch.long, device=dev)
    done = torch.zeros(B, dtype=torch.bool, device=dev); mx = torch.tensor(maxnew, device=dev)
    ar = torch.arange(Lm, device=dev)
    for t in range(max(maxnew)):
        nx = model.logits(last).float().argmax(-1)
        nx = torch.where(done, torch.ones_like(nx), nx)
        out[:, t] = nx; done |= (nx == 1) | (t + 1 >= mx)
        if t % 16 == 15 and (bool(done.all()) or time.time() > deadline): break
        pos = (ln + t)[:, None]
        mask = torch.zeros(B, 1, 1, Lm, dtype=dt, device=dev).masked_fill_((ar > pos)[:, None, None], float("-inf"))
        last = model(nx[:, None], pos, mask, dt, [(K, V, rows, pos) for K, V in ca])[:, 0]
    res = []
    for o, m in zip(out.tolist(), maxnew):
        o = o[:m]; res.append(o[:o.index(1)] if 1 in o else o)
    return res


@torch.no_grad()
def evaluate(model, tok, ev, tag, deadline):
    enc = [tok.encode(p, add_special_tokens=False).ids for _, p, *_ in ev]
    exp = [tok.encode(x, add_special_tokens=False).ids for _, _, x, *_ in ev]
    order = sorted(range(len(ev)), key=lambda i: (len(enc[i]) > 1100, len(exp[i]) // 48, len(enc[i])))
    i, res = 0, {}
    while i < len(order) and time.time() < deadline:
        j = i
        grp = lambda k: (len(enc[k]) > 1100, len(exp[k]) // 48)
        while j < len(order) and j - i < 256 and (j - i + 1) * len(enc[order[j]]) <= 220000 and grp(order[j]) == grp(order[i]): j += 1
        j = max(j, i + 1)
        ix = order[i:j]
        for k, o in zip(ix, generate(model, tok, [enc[k] for k in ix], [len(exp[k]) + 12 for k in ix], deadline + 5)): res[k] = o
        i = j
    sc, bad = {}, []
    for k, o in res.items():
        name, p, x = ev[k][:3]
        g = tok.decode(o, skip_special_tokens=False)
        ok = g == x
        s = sc.setdefault(name, [0, 0, 0]); s[0] += 1; s[1] += ok; s[2] += g.split("</think>")[-1].strip() == x.split("</think>")[-1].strip()
        if not ok and len(bad) < 60 and sum(b[0] == name for b in bad) < 4: bad.append((name, p[-300:], x, g))
    r = {n: dict(n=v[0], exact=round(v[1] / v[0], 4), answer=round(v[2] / v[0], 4)) for n, v in sorted(sc.items())}
    tot = sum(v[1] for v in sc.values()) / max(1, sum(v[0] for v in sc.values()))
    log(f"{tag}: exact match {tot:.4f} over {len(res)} of {len(ev)} prompts: " + " ".join(f"{n} {v['exact']:.2f}/{v['answer']:.2f}" for n, v in r.items()))
    return dict(total=round(tot, 4), evaluated=len(res), tasks=r, failures=bad)


@torch.no_grad()
def mtp_accept(model, tok, ev, zero_first):
    """share of answer tokens that the MTP module guesses right, given the right previous token"""
    r = {}
    for name, p, x, *_ in ev:
        i0 = tok.encode(p, add_special_tokens=False).ids; i1 = tok.encode(x + D.EOS, add_special_tokens=False).ids
        if len(i0) + len(i1) > 1500: continue
        ids = torch.tensor([i0 + i1], device=dev)
        h = model(ids, None, None, dt); pos = torch.arange(ids.shape[1], device=dev)[None]
        g = model.logits(model.mtp_hidden(h[:, :-1], ids[:, 1:], pos[:, :-1], None, dt, (pos[:, :-1] == 0) if zero_first else None))[0].float().argmax(-1)
        lo = len(i0) - 1                      # from the step that knows the first answer token
        ok = (g[lo:-1] == ids[0, lo+2:]); s = r.setdefault(name, [0, 0]); s[0] += int(ok.sum()); s[1] += ok.numel()
    return dict(total=round(sum(s[0] for s in r.values()) / max(1, sum(s[1] for s in r.values())), 4), tasks={n: round(s[0] / max(1, s[1]), 4) for n, s in r.items()})


DEMO = [[D.U("What is MLA?")], [D.U("Hello, how are you?")], [D.U("Hello, how are you?"), D.A("I'm doing great. How can I help you today?"), D.U("I'd like to show off how chat templating works!")],
        [D.U("Who are you?")], [D.U("What is 347 + 285?")], [D.U("Extract the name, age and city as JSON: Zoe is 41 years old and lives in Porto.")], [D.U("Sort these numbers: 9, 44, 3, 71, 20")],
        [{"role": "system", "content": "You are a friendly chatbot."}, D.U("Tell me a joke.")], [D.U("Count to 12.")], [D.U("How can I make pancakes?")]]

def main():
    tok = Tokenizer.from_file(TOK + "/tokenizer.json")
    model, info = train()
    metrics = dict(info=info, args=vars(a), torch=torch.__version__, device=torch.cuda.get_device_name(0) if cuda else "cpu")
    def save(): json.dump(metrics, open(a.out + "/metrics.json", "w"), indent=1, ensure_ascii=False)
    export(model); save()
    try:
        M.load_hf(model, {k: v.to(dev) for k, v in M.hf_state(model).items()})     # evaluate the rounded bf16 weights
        outs = generate(model, tok, [tok.encode(D.prompt_text(m + [D.A("")]), add_special_tokens=False).ids for m in DEMO], [120] * len(DEMO))
        metrics["demo"] = [(m[-1]["content"], tok.decode(o, skip_special_tokens=False)) for m, o in zip(DEMO, outs)]
        for q, x in metrics["demo"]: log("demo |", q, "|", repr(x))
        ev = D.eval_set(123, a.eval_n, per_long=a.eval_long)
        log(f"evaluation set: {len(ev)} prompts")
        metrics["bf16"] = evaluate(model, tok, ev, "bf16", DEADLINE - 30); save()
        sub = [e for i, e in enumerate(ev) if i % 8 == 0]
        metrics["mtp_accept"] = mtp_accept(model, tok, sub, False); metrics["mtp_accept_zero_first"] = mtp_accept(model, tok, sub[:40], True)
        log("mtp acceptance", metrics["mtp_accept"]); save()
        M.load_hf(model, {k: v.to(dev) for k, v in M.dequant_state(M.fp8_state(M.hf_state(model))).items()}); M.Quant.acts = True
        metrics["fp8_w8a8"] = evaluate(model, tok, ev, "fp8", DEADLINE - 3); save()
    except Exception as e:
        import traceback; log("evaluation failed", traceback.format_exc()); metrics["error"] = repr(e)
    metrics["wall_seconds"] = time.time() - T0; save(); log("done")

if __name__ == "__main__": main()
