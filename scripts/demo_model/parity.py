# SPDX-License-Identifier: Apache-2.0
"""python3 parity.py CHECKPOINT_DIR: the exported checkpoint in transformers against the model that was trained, with the MTP layer."""
import sys, json, torch; sys.path.insert(0, __import__("os").path.dirname(__import__("os").path.abspath(__file__)))
import model as M, data as D
from safetensors.torch import load_file
d = sys.argv[1]
from transformers import AutoTokenizer, DeepseekV3ForCausalLM, AutoConfig
st = load_file(d + "/model.safetensors")
tok = AutoTokenizer.from_pretrained(d)
print(type(tok), tok.bos_token, tok.eos_token_id, tok.backend_tokenizer.pre_tokenizer)
s = tok.apply_chat_template([{"role": "user", "content": "What is MLA?"}], tokenize=False, add_generation_prompt=True)
print(repr(s), tok(s, add_special_tokens=False).input_ids, tok("Hello").input_ids, tok.decode(tok("Hello, world 123").input_ids))
if "quantization_config" in json.load(open(d + "/config.json")):
    cfg = AutoConfig.from_pretrained(d); del cfg.quantization_config
    hf = DeepseekV3ForCausalLM(cfg).float().eval()
    import tempfile, shutil, os
    t = tempfile.mkdtemp(); 
    from safetensors.torch import save_file
    save_file(M.dequant_state(st), t + "/model.safetensors", metadata={"format": "pt"}); c = json.load(open(d + "/config.json")); c.pop("quantization_config"); json.dump(c, open(t + "/config.json", "w"))
    d2 = t; st = M.dequant_state(st)
else: d2 = d
hf, info = DeepseekV3ForCausalLM.from_pretrained(d2, dtype=torch.float32, output_loading_info=True, attn_implementation="eager")
print({k: (list(v)[:6], len(v)) for k, v in info.items() if v})
m = M.Model().eval(); M.load_hf(m, st)
torch.manual_seed(0)
r = __import__("random").Random(5)
t, ms, tl = D.train_conv(r, "needle", 900)
ids = tok(D.prompt_text(ms, tl), return_tensors="pt", add_special_tokens=False).input_ids
ids = torch.cat([ids, torch.randint(3, 4000, (1, 1400 - ids.shape[1] if ids.shape[1] < 1400 else 10))], 1)
with torch.no_grad():
    a = hf(ids).logits; h = m(ids); b = m.logits(h)
    print("len", ids.shape, "max |logit diff|", (a - b).abs().max().item(), "scale", a.abs().max().item(), "argmax agree", (a.argmax(-1) == b.argmax(-1)).float().mean().item())
    # MTP against transformers' MtpModel layers
    from transformers.modeling_layers import MtpModel
    try:
        hf._keys_to_ignore_on_load_unexpected = [r"model\.layers\.5\..*"]
        mm = MtpModel.from_pretrained(hf).float().eval()
        pos = torch.arange(ids.shape[1] - 1)[None]
        e = mm.embed_tokens(ids[:, 1:]); 
        n = ids.shape[1] - 1; mask = torch.full((n, n), float("-inf")).triu(1)[None, None]
        x = mm.layers[0](e, h[:, :-1], mm.rotary_emb(e, position_ids=pos + 1), mask, pos + 1, None)
        la = mm._project_to_logits(x); lb = m.logits(m.mtp_hidden(h[:, :-1], ids[:, 1:], pos))
        print("mtp max diff", (la - lb).abs().max().item(), la.abs().max().item())
    except Exception as ex:
        import traceback; traceback.print_exc()
