/** Random numbers from a seed, and codes from logits. */

/** Mulberry32: a function that returns one uniform number in [0, 1) after the other. `seed` is an integer below 2³². */
export function uniformNumbers(seed) {
  let state = seed >>> 0;
  return () => {
    state = (state + 0x6d2b79f5) >>> 0;
    let bits = Math.imul(state ^ (state >>> 15), state | 1);
    bits ^= bits + Math.imul(bits ^ (bits >>> 7), bits | 61);
    return ((bits ^ (bits >>> 14)) >>> 0) / 2 ** 32;
  };
}

/**
 * Samples a code: the cumulative distribution of softmax(logits / temperature), restricted to the `topK` most likely
 * codes (and those as likely as the last of them), and of these to the codes whose preceding mass is below `topP`, is
 * inverted at `uniform`.
 */
export function sampleCode(logits, { temperature, topK, topP }, uniform) {
  const masses = softmax(logits, temperature);
  if (topK < logits.length) {
    const kthLargest = Float32Array.from(logits).sort()[logits.length - topK];
    logits.forEach((logit, code) => {
      if (logit < kthLargest) masses[code] = 0;
    });
  }
  if (topP < 1) {
    const nucleus = topP * sum(masses);
    let preceding = 0;
    for (const code of Array.from(masses.keys()).sort((a, b) => masses[b] - masses[a] || a - b)) {
      const mass = masses[code];
      if (preceding >= nucleus) masses[code] = 0;
      preceding += mass;
    }
  }
  const target = uniform * sum(masses);
  let cumulative = 0;
  let lastPossible = 0;
  for (let code = 0; code < masses.length; code++) {
    if (masses[code] === 0) continue;
    cumulative += masses[code];
    lastPossible = code;
    if (cumulative > target) break;
  }
  return lastPossible;
}

/** Probabilities up to a factor: the largest is 1. */
function softmax(logits, temperature) {
  const largest = logits.reduce((a, b) => Math.max(a, b), -Infinity);
  if (!Number.isFinite(largest)) {
    throw new Error("The model gave logits that are NaN or infinite.");
  }
  return Float64Array.from(logits, (logit) => Math.exp((logit - largest) / temperature));
}

function sum(values) {
  return values.reduce((a, b) => a + b, 0);
}
