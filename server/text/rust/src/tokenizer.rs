//! Byte-level BPE from a Hugging Face tokenizer.json.

use std::collections::HashMap;

use serde::Deserialize;
use tokenizers::{
    DecoderWrapper, Model, ModelWrapper, Normalizer, OffsetReferential, OffsetType,
    PreTokenizedString, PreTokenizer,
};

use crate::control::ControlSpellings;
use crate::Result;

pub const SPECIAL: u8 = 1;
pub const ADDED: u8 = 2;

/// Ids index a table, so a stray one must not make it gigabytes.
const MAX_ID: u32 = (1 << 24) - 1;

pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    pub control: ControlSpellings,
    pub bytes: Vec<u8>,      // what each id stands for, one after the other
    pub offsets: Vec<usize>, // [num_ids + 1]
    pub flags: Vec<u8>,      // [num_ids]
}

/// The parts of tokenizer.json that the library reads without telling us what it made of them.
#[derive(Deserialize)]
struct Header {
    #[serde(default)]
    added_tokens: Vec<HeaderToken>,
    model: HeaderModel,
}

#[derive(Deserialize)]
struct HeaderToken {
    id: u64,
    content: String,
}

#[derive(Deserialize)]
struct HeaderModel {
    #[serde(rename = "type")]
    kind: Option<String>,
    dropout: Option<f64>,
}

impl Tokenizer {
    pub fn new(json: &[u8]) -> Result<Self> {
        let header: Header = serde_json::from_slice(json).map_err(|e| e.to_string())?;
        if let Some(kind) = header.model.kind.as_deref().filter(|kind| *kind != "BPE") {
            return Err(format!("model.type is {kind}; supported is BPE"));
        }
        if let Some(dropout) = header.model.dropout.filter(|dropout| *dropout != 0.0) {
            return Err(format!("model.dropout is {dropout}; encoding would not be deterministic"));
        }
        let mut inner = tokenizers::Tokenizer::from_bytes(json).map_err(|e| e.to_string())?;
        if !matches!(inner.get_model(), ModelWrapper::BPE(_)) {
            return Err("model is not BPE".into());
        }
        if !matches!(inner.get_decoder(), Some(DecoderWrapper::ByteLevel(_))) {
            return Err("decoder is not of type ByteLevel".into());
        }
        // Settings of whoever saved the file, not of the model; Transformers resets them too.
        inner.with_truncation(None).map_err(|e| e.to_string())?;
        inner.with_padding(None);

        for token in &header.added_tokens {
            let id = inner.token_to_id(&token.content).map(u64::from);
            // The library numbers them anew where ids have gaps.
            if !token.content.is_empty() && id != Some(token.id) {
                return Err(format!(
                    "added token {:?} has id {}, but the vocabulary puts it at {}",
                    token.content, token.id, id.map_or("none".into(), |id| id.to_string())
                ));
            }
        }
        Self::with_tables(inner)
    }

    fn with_tables(inner: tokenizers::Tokenizer) -> Result<Self> {
        let added = inner.get_added_tokens_decoder();
        let vocab = inner.get_vocab(true);
        let max_id = vocab.values().chain(added.keys()).copied().max().ok_or("no tokens")?;
        if max_id > MAX_ID {
            return Err(format!("the largest id is {max_id}; supported are ids up to {MAX_ID}"));
        }
        let byte_of = bytes_of_chars();
        let vocabulary = inner.get_added_vocabulary();
        let (mut bytes, mut offsets, mut flags) = (Vec::new(), vec![0], Vec::new());
        for id in 0..=max_id {
            let token = vocabulary.simple_id_to_token(id).or_else(|| inner.get_model().id_to_token(id));
            let mut flag = if added.contains_key(&id) { ADDED } else { 0 };
            if let Some(token) = token {
                if vocabulary.is_special_token(&token) {
                    flag |= SPECIAL;
                }
                let mapped: Option<Vec<u8>> = token.chars().map(|c| byte_of.get(&c).copied()).collect();
                // As the ByteLevel decoder does: a token with any other character stands for itself.
                bytes.extend(mapped.unwrap_or_else(|| token.into_bytes()));
            }
            offsets.push(bytes.len());
            flags.push(flag);
        }
        let control = ControlSpellings::new(added.values().map(|token| token.content.as_str()));
        Ok(Self { control, bytes, offsets, flags, inner })
    }

    pub fn token_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    pub fn encode(&self, text: &str, parse_control_tokens: bool) -> Result<Vec<u32>> {
        if parse_control_tokens {
            let encoding = self.inner.encode_fast(text, false).map_err(|e| e.to_string())?;
            Ok(encoding.get_ids().to_vec())
        } else {
            let mut ids = Vec::with_capacity(text.len() / 3);
            self.encode_plain(text, &mut ids)?;
            Ok(ids)
        }
    }

    /// Encodes as `encode(text, true)` does, but what `restore` changes back is text only: control
    /// tokens are found before, the text between them is encoded after it.
    pub fn encode_restoring(&self, text: &str, restore: impl Fn(&str) -> String) -> Result<Vec<u32>> {
        let split = self
            .inner
            .get_added_vocabulary()
            .extract_and_normalize(self.inner.get_normalizer(), text);
        let mut ids = Vec::with_capacity(text.len() / 3);
        for (_, (begin, end), tokens) in split.get_splits(OffsetReferential::Original, OffsetType::Byte) {
            match tokens {
                Some(tokens) => ids.extend(tokens.iter().map(|token| token.id)),
                None => self.encode_plain(&restore(&text[begin..end]), &mut ids)?,
            }
        }
        Ok(ids)
    }

    /// Encodes without looking for added tokens.
    fn encode_plain(&self, text: &str, ids: &mut Vec<u32>) -> Result<()> {
        let mut split = PreTokenizedString::from(text);
        if let Some(normalizer) = self.inner.get_normalizer() {
            split.normalize(|s| normalizer.normalize(s)).map_err(|e| e.to_string())?;
        }
        if let Some(pre_tokenizer) = self.inner.get_pre_tokenizer() {
            pre_tokenizer.pre_tokenize(&mut split).map_err(|e| e.to_string())?;
        }
        let model = self.inner.get_model();
        split.tokenize(|s| model.tokenize(s.get())).map_err(|e| e.to_string())?;
        for (_, _, tokens) in split.get_splits(OffsetReferential::Original, OffsetType::None) {
            ids.extend(tokens.iter().flatten().map(|token| token.id));
        }
        Ok(())
    }
}

/// The alphabet of byte-level BPE: printable bytes are their own character, the others follow U+0100.
fn bytes_of_chars() -> HashMap<char, u8> {
    let mut next = 0x100;
    let mut map = HashMap::with_capacity(256);
    for byte in 0..=255u8 {
        let own = byte as char;
        if matches!(own, '!'..='~' | '\u{A1}'..='\u{AC}' | '\u{AE}'..='\u{FF}') {
            map.insert(own, byte);
        } else {
            map.insert(char::from_u32(next).unwrap_or_default(), byte);
            next += 1;
        }
    }
    map
}
