"use strict";
// ---- what is in the file: "about" is JSON; each array is base64 in a block of its own, decoded when first asked for ----

const about = JSON.parse(document.getElementById("about").textContent);
const {layers: L, heads: H, tokens: T, prefix: PREFIX, kept: K, head_dim: D_HEAD, dim: D} = about;
const [ROWS, COLUMNS] = about.grid;
const N = ROWS * COLUMNS;
const KINDS_OF_NUMBERS = {u1: Uint8Array, i1: Int8Array, u2: Uint16Array, f4: Float32Array};
const decoded = new Map();

/** Return the numbers of an array by its name, flat, in C order; null if the file has none of that name. */
function numbers(name) {
  if (!(name in about.arrays)) return null;
  if (!decoded.has(name)) {
    const text = document.getElementById(`array-${name}`).textContent;
    const bytes = Uint8Array.fromBase64 ? Uint8Array.fromBase64(text) : bytesOf(atob(text));
    decoded.set(name, new KINDS_OF_NUMBERS[about.arrays[name].dtype](bytes.buffer));
  }
  return decoded.get(name);
}

function bytesOf(text) {
  const bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
  return bytes;
}

/**
 * Return row number `at` of a map. Maps are bytes b with one scale m for each row, its largest absolute value: the value is
 * (b/255)²·m, or sign(b)·(b/127)²·m where it has a sign. So small numbers keep more digits than large ones.
 */
function mapRow(name, at) {
  const {shape, dtype} = about.arrays[name];
  const length = shape[shape.length - 1], top = dtype === "i1" ? 127 : 255;
  const bytes = numbers(name), scale = numbers(`${name}_scale`)[at] / (top * top);
  const row = new Float32Array(length);
  for (let i = 0; i < length; i++) {
    const b = bytes[at * length + i];
    row[i] = Math.abs(b) * b * scale;
  }
  return row;
}

/** Return vector number `at`, of `length` numbers, of an array. */
function vector(name, at, length) {
  return numbers(name).subarray(at * length, (at + 1) * length);
}

// ---- what is drawn: P(l, h), dP, both multiplied; and three that speak of the whole model ----

const attention = (l, h, i) => mapRow("P", (l * H + h) * T + i);
const gradient = (l, h, i) => mapRow("dP", ((state.follow * L + l) * H + h) * T + i);
function product(l, h, i) {
  const p = attention(l, h, i), g = gradient(l, h, i);
  return p.map((x, j) => x * g[j]);
}
const positive = (row) => row.map((x) => Math.max(x, 0));
function gradientOfAll(l, h) {  // LeGrad's part of a head: the mean over queries of (dP)⁺
  const sum = new Float32Array(T);
  for (let i = 0; i < T; i++) gradient(l, h, i).forEach((x, j) => { if (x > 0) sum[j] += x / T; });
  return sum;
}

const KINDS = [
  {name: "attention", part: attention,
   says: "Each small map is one head: how much the token in question attends to each patch. A row sums to 1."},
  {name: "gradient", part: gradient, signed: true,
   says: "∂ logit / ∂ P: how fast the followed logit changes as this one attention grows and no other of its layer does. Orange raises it, blue lowers it."},
  {name: "product", part: product, signed: true,
   says: "Attention × its gradient: what this attention is worth to the followed logit, to first order."},
  {name: "rollout", part: attention, whole: (i) => mapRow("rollout", i),
   says: "Attention multiplied through all layers, with the residual counted (Abnar and Zuidema 2020). It knows no class. The large picture is of the whole model, a small map is a head's part."},
  {name: "relevance", part: (l, h, i) => positive(product(l, h, i)), whole: (i) => mapRow("relevance", state.follow * T + i),
   says: "The positive part of attention × gradient, mean of the heads, multiplied through all layers with the residual counted (Chefer et al. 2021). The large picture is of the whole model, a small map is a head's part."},
  {name: "LeGrad", part: gradientOfAll, whole: () => [...new Float32Array(PREFIX), ...mapRow("legrad", state.follow)], all: true,
   says: "The positive part of the attention's gradient, averaged over queries, heads and layers (Bousselham et al. 2024), here of the model's own logit in every layer. It is of all queries at once. The large picture is of the whole model, a small map is a head's part."},
];

/** Return a row of a map for a token; for READ, the row that the class is read from: the class token's, or the patches' mean, weighed if the model weighs them. */
const READ = -1, CLASS = about.reads === "class" || about.reads === "both";
function rowOf(of, token) {
  if (token !== READ) return of(token);
  if (CLASS) return of(0);
  const mean = new Float32Array(T);
  const weights = about.reads === "seq" ? numbers("token_weights") : null;
  for (let i = PREFIX; i < T; i++) of(i).forEach((x, j) => { mean[j] += weights ? x * weights[i] : x / N; });
  return mean;
}

// ---- words ----

const superscript = (n) => String(n).replace(/[-0-9]/g, (c) => (c === "-" ? "⁻" : "⁰¹²³⁴⁵⁶⁷⁸⁹"[c]));
/** Return a number with four digits. */
function digits(x) {
  if (!Number.isFinite(x)) return String(x);
  if (x === 0) return "0";
  const power = Math.floor(Math.log10(Math.abs(x)));
  const text = power < -4 || power > 5
    ? `${(x / 10 ** power).toFixed(3)}·10${superscript(power)}`
    : x.toPrecision(4).replace(/e.*/, "");
  return text.replace("-", "−");
}
const percent = (p) => (p >= 0.9995 && p < 1 ? "> 99.9%" : p < 0.0005 && p > 0 ? "< 0.1%" : `${(100 * p).toFixed(1)}%`);
const className = (c) => about.classes[c];
const short = (text, width = 28) => (text.length > width ? `${text.slice(0, width - 1)}…` : text);
function tokenName(i) {
  if (i === READ) return CLASS ? "class token" : about.reads === "seq" ? "weighted mean of all patches" : "mean of all patches";
  if (i < PREFIX) return about.beside[i];
  return `patch ${Math.floor((i - PREFIX) / COLUMNS) + 1}, ${((i - PREFIX) % COLUMNS) + 1}`;
}
const theToken = (i) => (i >= PREFIX ? tokenName(i) : `the ${tokenName(i)}`);

/** Make an element; `children` are elements or texts, which are text whatever they say. */
function make(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name in made && typeof value !== "string") made[name] = value;
    else made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
}
const find = (id) => document.getElementById(id);
