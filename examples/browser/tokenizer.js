/**
 * The tokenizers that `rq_hf.text.train_tokenizer` makes: byte-level BPE on lower-cased text, read from tokenizer.json.
 * The token ids are those of the tokenizers library.
 */

// As in GPT-2. White space is that of Unicode, which `\s` of JavaScript is not.
const WORDS =
  /'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\p{White_Space}\p{L}\p{N}]+|\p{White_Space}+(?!\P{White_Space})|\p{White_Space}+/gu;

const NORMALIZERS = {
  NFC: (text) => text.normalize("NFC"),
  // Character by character: a Σ at the end of a word becomes σ, not ς.
  Lowercase: (text) => Array.from(text, (character) => character.toLowerCase()).join(""),
};

/** The printable character that stands for each byte: itself where it is one, otherwise one from U+0100 on. */
const BYTE_CHARACTERS = (() => {
  const isPrintable = (byte) => (byte >= 0x21 && byte <= 0x7e) || (byte >= 0xa1 && byte !== 0xad);
  let next = 0x100;
  return Array.from({ length: 256 }, (_, byte) => String.fromCharCode(isPrintable(byte) ? byte : next++));
})();

export class Tokenizer {
  /** Throws an error for a tokenizer of another kind. */
  constructor({ added_tokens, normalizer, pre_tokenizer, post_processor, model }) {
    this.normalizers = normalizer === null ? [] : (normalizer.normalizers ?? [normalizer]).map(({ type }) => type);
    requireKind("normalizer", this.normalizers.every((type) => type in NORMALIZERS), normalizer);
    requireKind("pre-tokenizer", pre_tokenizer?.type === "ByteLevel" && pre_tokenizer.use_regex, pre_tokenizer);
    requireKind("post-processor", post_processor === null || addsNothing(post_processor), post_processor);
    const { type, dropout, unk_token, continuing_subword_prefix, end_of_word_suffix, ignore_merges } = model;
    const options = [dropout, unk_token, continuing_subword_prefix, end_of_word_suffix, ignore_merges];
    requireKind("model", type === "BPE" && !options.some(Boolean), { ...model, vocab: "…", merges: "…" });
    for (const token of added_tokens) {
      const { normalized, lstrip, rstrip, single_word } = token;
      requireKind("added token", !normalized && !lstrip && !rstrip && !single_word, token);
    }
    this.addPrefixSpace = pre_tokenizer.add_prefix_space;
    this.addedTokens = new Map(added_tokens.map(({ content, id }) => [content, id]));
    this.vocabulary = new Map(Object.entries(model.vocab));
    const pairs = model.merges.map((pair) => (typeof pair === "string" ? pair : pair.join(" ")));
    this.ranks = new Map(pairs.map((pair, rank) => [pair, rank]));
    const alternatives = [...this.addedTokens.keys()].sort((a, b) => b.length - a.length).map(escapeRegExp);
    this.addedTokenPattern = new RegExp(`(${alternatives.join("|") || "(?!)"})`, "u");
  }

  /** Token ids of a text. */
  encode(text) {
    // Splitting by a pattern with a group keeps the separators: every second part is an added token.
    return text.split(this.addedTokenPattern).flatMap((part, i) => {
      return i % 2 ? [this.addedTokens.get(part)] : this.encodePart(part);
    });
  }

  encodePart(text) {
    for (const type of this.normalizers) {
      text = NORMALIZERS[type](text);
    }
    if (this.addPrefixSpace && text && !text.startsWith(" ")) {
      text = ` ${text}`;
    }
    return (text.match(WORDS) ?? []).flatMap((word) => {
      const bytes = new TextEncoder().encode(word);
      const symbols = this.merge(Array.from(bytes, (byte) => BYTE_CHARACTERS[byte]));
      return symbols.map((symbol) => this.vocabulary.get(symbol));
    });
  }

  /** Merges neighbours in the order in which the merges were learned. */
  merge(symbols) {
    for (;;) {
      let best = { rank: Infinity };
      for (let i = 0; i + 1 < symbols.length; i++) {
        const rank = this.ranks.get(`${symbols[i]} ${symbols[i + 1]}`) ?? Infinity;
        if (rank < best.rank) {
          best = { rank, i };
        }
      }
      if (best.rank === Infinity) {
        return symbols;
      }
      symbols.splice(best.i, 2, symbols[best.i] + symbols[best.i + 1]);
    }
  }
}

/** Whether a post-processor leaves the ids of a single text as they are. */
function addsNothing({ type, single }) {
  return type === "ByteLevel" || (type === "TemplateProcessing" && single.length === 1 && "Sequence" in single[0]);
}

function requireKind(part, isOfKind, found) {
  if (!isOfKind) {
    throw new Error(
      `This page reads byte-level BPE tokenizers; the ${part} of tokenizer.json is ${JSON.stringify(found)}.`,
    );
  }
}

function escapeRegExp(text) {
  return text.replace(/[.*+?^${}()|[\]\\/]/g, "\\$&");
}
