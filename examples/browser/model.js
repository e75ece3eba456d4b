/**
 * A text-to-image model that `python -m rq_hf.export_onnx` wrote. Shapes: B rows (2 with guidance), H W code grid, D
 * codes per position, L tokens of text.
 */

import { sampleCode, uniformNumbers } from "./sampling.js";
import { Tokenizer } from "./tokenizer.js";

export class Model {
  /**
   * Downloads and checks the files in the folder at `url`, which ends with a slash. `ort` is onnxruntime-web;
   * `onProgress` is called with the bytes loaded and their total.
   */
  static async load(ort, url, onProgress = () => {}) {
    if (!globalThis.crypto.subtle) {
      throw new Error("Browsers let only pages from https:// or localhost check what they download. Open this page there.");
    }
    const description = JSON.parse(new TextDecoder().decode(await download(new URL("onnx.json", url))));
    if (description.condition.kind !== "text") {
      throw new Error(`This page samples from words, but the condition of its model is "${description.condition.kind}".`);
    }
    const files = Object.entries(description.files);
    const total = files.reduce((bytes, [, file]) => bytes + file.bytes, 0);
    let loaded = 0;
    const contents = {};
    for (const [name, { sha256 }] of files) {
      contents[name] = await download(new URL(name, url), (bytes) => onProgress((loaded += bytes), total));
      if ((await digest(contents[name])) !== sha256) {
        throw new Error(`${name} is not the file that onnx.json describes. Reload the page, or export the model again.`);
      }
    }
    const tokenizer = new Tokenizer(JSON.parse(new TextDecoder().decode(contents["tokenizer.json"])));
    const session = (name) => ort.InferenceSession.create(contents[name], { executionProviders: ["wasm"] });
    const steps = {
      spatial: await session("spatial_step.onnx"),
      depth: await session("depth_step.onnx"),
      decoder: await session("decoder.onnx"),
    };
    return new Model(ort, description, tokenizer, steps);
  }

  constructor(ort, description, tokenizer, steps) {
    Object.assign(this, { ort, description, tokenizer, steps });
  }

  /** Token ids of a prompt, padded to L. Throws an error for a longer one. */
  encode(prompt) {
    const { length, padding } = this.description.condition;
    const ids = this.tokenizer.encode(prompt);
    if (ids.length > length) {
      throw new Error(`A prompt may have at most ${length} tokens; this one has ${ids.length}. Use fewer words.`);
    }
    return [...ids, ...Array(length - ids.length).fill(padding)];
  }

  /**
   * Samples a code map, position after position, and yields its codes (H·W·D numbers, 0 where not yet sampled) and the
   * number of positions sampled. Each of `temperature`, `topK`, `topP` and `guidanceScale` is one number per depth.
   */
  async *sample(prompt, { temperature, topK, topP, guidanceScale }, seed) {
    const [height, width, depth] = this.description.code_shape;
    const { condition, cache } = this.description;
    const isGuided = guidanceScale.some((scale) => scale !== 1);
    const rows = isGuided ? 2 : 1;
    const ids = this.encode(prompt);
    const tokens = isGuided ? [...ids, ...ids.map(() => condition.null)] : ids;
    const random = uniformNumbers(seed);
    const codes = new Uint32Array(height * width * depth);

    let inputs = {
      cond_ids: this.integers(tokens, [rows, condition.length]),
      codes: this.integers([], [rows, 0, depth]),
      past: new this.ort.Tensor("float32", [], [cache.layers, 2, rows, cache.heads, 0, cache.dim]),
    };
    for (let position = 0; position < height * width; position++) {
      const { context, present } = await this.steps.spatial.run(inputs);
      let chosen = [];
      for (let d = 0; d < depth; d++) {
        const feeds = { context, codes: this.integers(repeat(chosen, rows), [rows, d]) };
        const { logits } = await this.steps.depth.run(feeds);
        const guided = isGuided ? guide(logits.data, guidanceScale[d]) : logits.data;
        const settings = { temperature: temperature[d], topK: topK[d], topP: topP[d] };
        chosen = [...chosen, sampleCode(guided, settings, random())];
      }
      codes.set(chosen, position * depth);
      inputs = {
        cond_ids: this.integers([], [rows, 0]),
        codes: this.integers(repeat(chosen, rows), [rows, 1, depth]),
        past: present,
      };
      yield { codes, numPositions: position + 1 };
    }
  }

  /** The image of the first positions of a code map, as RGBA in bytes. */
  async decode(codes, numPositions) {
    const { height, width, channels } = this.description.image;
    const { pixels } = await this.steps.decoder.run({
      codes: this.integers(codes, [1, ...this.description.code_shape]),
      num_positions: this.integers([numPositions], []),
    });
    const rgba = new Uint8ClampedArray(4 * height * width).fill(255);
    for (let channel = 0; channel < 3; channel++) {
      const plane = (channel % channels) * height * width; // the only one of a grey image
      for (let i = 0; i < height * width; i++) {
        rgba[4 * i + channel] = Math.round(255 * pixels.data[plane + i]);
      }
    }
    return { width, height, rgba };
  }

  integers(values, shape) {
    return new this.ort.Tensor("int64", BigInt64Array.from(values, BigInt), shape);
  }
}

/** Classifier-free guidance: null + s·(conditional − null), of logits of both in this order. */
function guide(logits, scale) {
  const size = logits.length / 2;
  const nulls = logits.subarray(size);
  return logits.subarray(0, size).map((logit, code) => nulls[code] + scale * (logit - nulls[code]));
}

function repeat(values, times) {
  return Array.from({ length: times }, () => values).flat();
}

async function download(url, onProgress = () => {}) {
  const response = await fetch(url).catch(() => {
    throw new Error(`${url} cannot be reached. Check the connection and reload the page.`);
  });
  if (!response.ok) {
    throw new Error(`${url} is missing (${response.status}). The README says how to export a model for this page.`);
  }
  const parts = [];
  for (const reader = response.body.getReader(); ; ) {
    const { done, value } = await reader.read();
    if (done) break;
    parts.push(value);
    onProgress(value.length);
  }
  return new Uint8Array(await new Blob(parts).arrayBuffer());
}

/** SHA-256 in hexadecimal digits. */
async function digest(bytes) {
  const hash = new Uint8Array(await crypto.subtle.digest("SHA-256", bytes));
  return Array.from(hash, (byte) => byte.toString(16).padStart(2, "0")).join("");
}
