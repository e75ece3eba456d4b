/** Samples in a thread of its own, so that the page stays responsive. The messages are those of page.js. */

import { Model } from "./model.js";

let model;

const TASKS = {
  async load({ runtime, folder }) {
    const ort = await import(runtime).catch(() => {
      throw new Error(`${runtime} is missing. The README says how to get onnxruntime-web for this page.`);
    });
    ort.env.wasm.numThreads = 1;
    model = await Model.load(ort, folder, (loaded, total) => postMessage({ kind: "progress", loaded, total }));
    postMessage({ kind: "ready", description: model.description });
  },

  /** An image for each of the seeds, shown after every second row of its code map. */
  async sample({ prompt, settings, seeds }) {
    const [height, width] = model.description.code_shape;
    for (const seed of seeds) {
      for await (const { codes, numPositions } of model.sample(prompt, settings, seed)) {
        if (numPositions % (2 * width) === 0 || numPositions === height * width) {
          const image = await model.decode(codes, numPositions);
          postMessage({ kind: "image", seed, image, share: numPositions / (height * width) });
        }
      }
    }
    postMessage({ kind: "finished" });
  },
};

onmessage = async ({ data }) => {
  try {
    await TASKS[data.kind](data);
  } catch (error) {
    postMessage({ kind: "failed", message: error.message });
  }
};
