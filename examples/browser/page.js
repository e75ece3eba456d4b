/** The form, the gallery, and what the worker says. */

const LARGEST_SEED = 2 ** 32 - 1;
const MOST_IMAGES = 60; // in the gallery

const form = document.querySelector("form");
const { prompt, count, seed, temperature, topK, topP, guidance } = form.elements;
const button = form.querySelector("button[type=submit]");
const status = document.querySelector("#status");
const message = document.querySelector("#message");
const progress = document.querySelector("progress");
const gallery = document.querySelector("#gallery");
const template = document.querySelector("template");

let description;
let figures = new Map(); // of the images that are being sampled, by seed
let startTime;

const worker = new Worker(new URL("worker.js", import.meta.url), { type: "module" });
worker.onmessage = ({ data }) => HANDLERS[data.kind](data);
worker.onerror = () => HANDLERS.failed({ message: "This browser cannot run the page. Use a current one." });
worker.postMessage({
  kind: "load",
  runtime: import.meta.resolve("onnxruntime-web"),
  folder: new URL("model/", document.baseURI).href,
});

const HANDLERS = {
  progress({ loaded, total }) {
    progress.value = loaded / total;
    status.textContent = `Loading the model, once: ${megabytes(loaded)} of ${megabytes(total)}`;
  },

  ready(loaded) {
    description = loaded.description;
    const { generation, condition } = description;
    const defaults = [
      [temperature, generation.temperature],
      [topK, generation.top_k],
      [topP, generation.top_p],
      [guidance, generation.guidance_scale],
    ];
    for (const [input, values] of defaults) {
      input.placeholder = new Set(values).size === 1 ? values[0] : "varies with depth";
    }
    guidance.disabled = condition.null === null;
    setBusy(false);
    status.textContent = "Ready";
  },

  image({ seed, image, share }) {
    const figure = figures.get(seed);
    const canvas = figure.querySelector("canvas");
    canvas.width = image.width;
    canvas.height = image.height;
    const knownRows = Math.round(share * image.height); // below them, the decoder has nothing to go on
    canvas.getContext("2d").putImageData(new ImageData(image.rgba, image.width), 0, 0, 0, 0, image.width, knownRows);
    if (share === 1) {
      figure.classList.remove("unfinished");
      const link = figure.querySelector("a");
      link.href = canvas.toDataURL("image/png");
      link.download = `${fileName(figure.dataset.prompt)}-${seed}.png`;
      link.hidden = false;
    }
    const finished = [...figures.values()].filter((other) => !other.classList.contains("unfinished")).length;
    progress.value = (finished + (share % 1)) / figures.size;
    status.textContent = `Sampling: ${finished} of ${figures.size}`;
  },

  finished() {
    const seconds = (performance.now() - startTime) / 1000 / figures.size;
    setBusy(false);
    status.textContent = `Done, ${seconds.toFixed(1)} s per image`;
  },

  failed(failure) {
    for (const figure of gallery.querySelectorAll(".unfinished")) {
      figure.remove();
    }
    message.textContent = failure.message;
    message.hidden = false;
    setBusy(false);
    button.disabled = description === undefined; // without a model
    status.textContent = "";
  },
};

form.addEventListener("submit", (event) => {
  event.preventDefault();
  const text = prompt.value.trim();
  const isRandom = seed.value === "";
  const first = isRandom ? Math.floor(Math.random() * 10 ** 6) : seed.valueAsNumber;
  const seeds = Array.from({ length: count.valueAsNumber }, (_, i) => (first + i) % (LARGEST_SEED + 1));
  const { generation } = description;
  const settings = {
    temperature: perDepth(temperature, generation.temperature),
    topK: perDepth(topK, generation.top_k),
    topP: perDepth(topP, generation.top_p),
    guidanceScale: perDepth(guidance, generation.guidance_scale),
  };
  figures = new Map(seeds.map((seed) => [seed, createFigure(text, seed)]));
  gallery.prepend(...figures.values());
  [...gallery.children].slice(MOST_IMAGES).forEach((figure) => figure.remove());
  message.hidden = true;
  setBusy(true);
  progress.value = 0;
  status.textContent = `Sampling: 0 of ${seeds.length}`;
  startTime = performance.now();
  worker.postMessage({ kind: "sample", prompt: text, settings, seeds });
});

for (const example of document.querySelectorAll("#examples button")) {
  example.addEventListener("click", () => {
    prompt.value = example.textContent;
    if (!button.disabled) form.requestSubmit();
  });
}

function createFigure(text, seed) {
  const figure = template.content.cloneNode(true).firstElementChild;
  figure.dataset.prompt = text;
  figure.querySelector("canvas").setAttribute("aria-label", text);
  figure.querySelector(".prompt").textContent = text;
  const reuse = figure.querySelector(".seed");
  reuse.textContent = `seed ${seed}`;
  reuse.addEventListener("click", () => {
    prompt.value = text;
    form.elements.seed.value = seed;
    form.querySelector("details").open = true;
  });
  return figure;
}

/** One number per depth: that of a field, or where it is empty those of the model. */
function perDepth(input, values) {
  return input.value === "" ? values : values.map(() => input.valueAsNumber);
}

function setBusy(isBusy) {
  button.disabled = isBusy;
  progress.hidden = !isBusy;
}

/** Letters and digits of a text, words separated by hyphens. */
function fileName(text) {
  return text.replace(/[^\p{L}\p{N}]+/gu, "-").replace(/^-|-$/g, "").slice(0, 50) || "image";
}

function megabytes(bytes) {
  return `${(bytes / 1e6).toFixed(1)} MB`;
}
