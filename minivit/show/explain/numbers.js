// ---- one head's numbers for a query i and a key j, each with its formula, and what one gets by hand ----

const range = (n) => Array.from({length: n}, (_, i) => i);
const at = (l, h) => l * H + h;
const own = (name, l, h, a) => vector(name, at(l, h) * K + a, D_HEAD);
const followed = (name, l, h, a) => vector(name, (state.follow * L * H + at(l, h)) * K + a, D_HEAD);
const pair = (name, l, h, a, b) => numbers(name)[(at(l, h) * K + a) * K + b];
const pairFollowed = (name, l, h, a, b) => numbers(name)[((state.follow * L * H + at(l, h)) * K + a) * K + b];
const ALL_KEPT = K === T;
const rest = (of, name, l, h, a, e) => (ALL_KEPT ? 0 : of(name, l, h, a)[e]);

/**
 * Each number: its formula, the engine's value of it at {layer l, head h, query a, key b, entry e}, and the products that it is
 * the sum of; `rest` is that of the tokens whose numbers are not in the file, `last` what is done to the sum. What needs numbers
 * from outside the head is given: in words, and the whole vector.
 */
const scaleOf = ({l, h}) => numbers("scale")[at(l, h)], BIAS = "relative" in about.arrays, USUAL = range(L * H).every((i) => Math.abs(numbers("scale")[i] * Math.sqrt(D_HEAD) - 1) < 1e-5);
const scaled = (where) => (USUAL ? {divide: Math.sqrt(D_HEAD), text: ` / √${D_HEAD}`} : {divide: 1 / scaleOf(where), text: ` × ${digits(scaleOf(where))}`});
const SCALE = USUAL ? "/ √d" : "· τ";
const before = ["pre", "parallel", "between"].includes(about.block) ? ", after the first norm of the layer," : "";
const PROJECTED = `the token${before} times the layer's weight, plus its bias.`, NORMED = PROJECTED.replace(".", about.qk_norm ? ", then normalised." : ".");
const FORWARD = [
  {name: "q", entry: true, formula: "Q_i, the query", value: ({l, h, a, e}) => own("q", l, h, a)[e], given: ({l, h, a}) => [NORMED, own("q", l, h, a)]},
  {name: "k", entry: true, formula: "K_j, the key", value: ({l, h, b, e}) => own("k", l, h, b)[e], given: ({l, h, b}) => [NORMED, own("k", l, h, b)]},
  {name: "v", entry: true, formula: "V_j, the value", value: ({l, h, b, e}) => own("v", l, h, b)[e], given: ({l, h, b}) => [PROJECTED, own("v", l, h, b)]},
  {name: "score", formula: `S_ij = Q_i · K_j ${SCALE}${BIAS ? " + B_ij" : ""}`, value: ({l, h, a, b}) => pair("s", l, h, a, b),
   terms: ({l, h, a, b}) => range(D_HEAD).map((e) => [own("q", l, h, a)[e], own("k", l, h, b)[e]]), last: scaled, bias: BIAS},
  {name: "attention", formula: "P_ij = e^ij / Σ_k e^ik", value: ({l, h, a, b}) => pair("p", l, h, a, b), softmax: true},
  {name: "context", entry: true, formula: "O_i = Σ_k P_ik V_k", value: ({l, h, a, e}) => own("o", l, h, a)[e],
   terms: ({l, h, a, e}) => range(K).map((k) => [pair("p", l, h, a, k), own("v", l, h, k)[e]]), rest: ({l, h, a, e}) => rest(own, "o_rest", l, h, a, e)},
];
const BACK = [
  {name: "dO", entry: true, formula: "dO_i, through the projection", value: ({l, h, a, e}) => followed("do", l, h, a)[e],
   given: ({l, h, a}) => ["dY·W, with W the weight of the projection after the heads and dY the gradient of what it adds to the tokens.", followed("do", l, h, a)]},
  {name: "dV", entry: true, formula: "dV_j = Σ_k P_kj dO_k", value: ({l, h, b, e}) => followed("dv", l, h, b)[e],
   terms: ({l, h, b, e}) => range(K).map((k) => [pair("p", l, h, k, b), followed("do", l, h, k)[e]]), rest: ({l, h, b, e}) => rest(followed, "dv_rest", l, h, b, e)},
  {name: "dP", formula: "dP_ij = dO_i · V_j", value: ({l, h, a, b}) => pairFollowed("dp", l, h, a, b),
   terms: ({l, h, a, b}) => range(D_HEAD).map((e) => [followed("do", l, h, a)[e], own("v", l, h, b)[e]])},
  {name: "dS", formula: "dS_ij = P_ij (dP_ij − dO_i · O_i)", value: ({l, h, a, b}) => pairFollowed("ds", l, h, a, b), jacobian: true},
  {name: "dQ", entry: true, formula: `dQ_i = Σ_k dS_ik K_k ${SCALE}`, value: ({l, h, a, e}) => followed("dq", l, h, a)[e],
   terms: ({l, h, a, e}) => range(K).map((k) => [pairFollowed("ds", l, h, a, k), own("k", l, h, k)[e]]),
   rest: ({l, h, a, e}) => rest(followed, "dq_rest", l, h, a, e), last: scaled},
  {name: "dK", entry: true, formula: `dK_j = Σ_k dS_kj Q_k ${SCALE}`, value: ({l, h, b, e}) => followed("dk", l, h, b)[e],
   terms: ({l, h, b, e}) => range(K).map((k) => [pairFollowed("ds", l, h, k, b), own("q", l, h, k)[e]]),
   rest: ({l, h, b, e}) => rest(followed, "dk_rest", l, h, b, e), last: scaled},
];

/** Return what one gets by hand for a number: {result, size (of the summands), text}; the text only where it is asked for. */
function byHand(number, where, written) {
  const {l, h, a, b} = where, others = `${T - K} other tokens`;
  if (number.softmax) {
    const [high, beside] = vector("z", at(l, h) * K + a, 2), powers = range(K).map((k) => (about.diagonal && k === a ? 0 : Math.exp(pair("s", l, h, a, k) - high)));
    const sum = powers.reduce((s, x) => s + x, beside);
    const text = written && about.diagonal && a === b ? "no token of this model attends to itself: 0" : written && `with the row's largest score ${digits(high)} taken from all of them: e^(${digits(pair("s", l, h, a, b))} − ${digits(high)}) = ${digits(powers[b])}, divided by `
      + `${powers.map(digits).join(" + ")}${ALL_KEPT ? "" : ` + ${digits(beside)} of ${others}`} = ${digits(sum)}`;
    return {result: powers[b] / sum, size: 1, text};
  }
  if (number.jacobian) {
    const p = pair("p", l, h, a, b), dp = pairFollowed("dp", l, h, a, b), g = followed("do", l, h, a), o = own("o", l, h, a);
    const products = range(D_HEAD).map((e) => g[e] * o[e]), sum = products.reduce((s, x) => s + x, 0);
    const text = written && `dOᵢ · Oᵢ, which is Σₖ Pᵢₖ dPᵢₖ: ${sumText(range(D_HEAD).map((e) => [g[e], o[e]]))} = ${digits(sum)}; then ${digits(p)} × (${digits(dp)} − ${bracket(sum)})`;
    return {result: p * (dp - sum), size: p * (Math.abs(dp) + products.reduce((s, x) => s + Math.abs(x), 0)), text};
  }
  const terms = number.terms(where), last = number.last && number.last(where), divide = last ? last.divide : 1;
  const beside = number.bias ? pair("relative", l, h, a, b) : number.rest ? number.rest(where) : 0;
  const sum = terms.reduce((s, [x, y]) => s + x * y, 0) / divide + beside;
  const size = terms.reduce((s, [x, y]) => s + Math.abs(x * y), 0) / divide + Math.abs(beside);
  const text = written && `${last ? "(" : ""}${sumText(terms)}${last ? `)${last.text}` : ""}${number.bias ? ` + ${bracket(beside)}` : number.rest && !ALL_KEPT ? ` + ${bracket(beside)} of ${others}` : ""}`;
  return {result: sum, size, text};
}
const bracket = (x) => (x < 0 ? `(${digits(x)})` : digits(x));
const sumText = (terms) => terms.map(([x, y]) => `${bracket(x)}×${bracket(y)}`).join(" + ");

/** Return a formula with its indices set low; ^ij is the score of i and j as a power. */
function formula(text) {
  return make("span", {class: "formula"}, ...text.split(/([_^][a-z]+)/).map((part) =>
    part[0] === "_" ? make("sub", {}, part.slice(1)) : part[0] === "^" ? make("sup", {}, "S", make("sub", {}, part.slice(1))) : part));
}

function makeNumbers() {
  for (const [id, list] of [["forward", FORWARD], ["back", BACK]])
    for (const number of list) {
      number.shown = make("span", {class: "value"});
      number.body = make("p", {class: "written"});
      number.box = make("details", {class: "line"}, make("summary", {}, formula(number.formula), number.shown), number.body);
      number.box.addEventListener("toggle", () => writeOut(number));
      find(id).append(number.box);
    }
  const choice = (id, label) => make("label", {}, `${label} `, make("select", {id}));
  find("choose").append(choice("query", "query i"), choice("key", "key j"),
    make("label", {}, "entry of the vectors ", make("input", {id: "entry", type: "number", min: "1", max: String(D_HEAD), value: "1"})));
  for (const id of ["query", "key", "entry"])
    find(id).addEventListener("input", () => {
      state.chosen[id] = id === "entry" ? Math.min(Math.max(Math.round(Number(find(id).value)) || 1, 1), D_HEAD) - 1 : Number(find(id).value);
      if (id === "query") setToken(state.chosen.query, true);
      wanted.numbers = true;
      later();
    });
  find("check").addEventListener("click", () => {
    const {count, worst} = check();
    find("checked").textContent = `${count.toLocaleString("en")} numbers computed again from those beside them: the engine's differ by at most ${digits(worst)} of the largest in the row. They are float32, which rounds by 6·10⁻⁸ in every step.`;
  });
}

/** Return which of the tokens whose numbers are in the file are meant: places in the list of kept ones. */
function chosenPlace() {
  const kept = [...keptTokens(state.layer, state.head)], asked = state.token === READ ? kept[0] : state.token;
  const a = Math.max(0, kept.indexOf(asked)), {chosen} = state;
  let b = kept.indexOf(chosen.key);
  if (b < 0) b = range(K).reduce((best, k) => (pair("p", state.layer, state.head, a, k) > pair("p", state.layer, state.head, a, best) ? k : best), 0);
  return {kept, known: kept.includes(asked), where: {l: state.layer, h: state.head, a, b, e: chosen.entry}};
}

function writeOut(number) {
  if (!number.box.open) return;
  const {where} = chosenPlace(), entry = number.entry ? `entry ${where.e + 1}: ` : "";
  if (number.given) {
    const [how, all] = number.given(where);
    number.body.textContent = `${how} All ${D_HEAD}: ${Array.from(all, digits).join(", ")}.`;
    return;
  }
  const {result, size, text} = byHand(number, where, true), value = number.value(where);
  const same = Math.abs(result - value) <= 2e-4 * (size || 1);
  number.body.replaceChildren(`${entry}${text} = `, make("b", {}, digits(result)), same ? `, as the engine's ${digits(value)}.` : `, but the engine's is ${digits(value)}.`);
}

function drawNumbers() {
  const {kept, known, where} = chosenPlace(), {l, h, a, b, e} = where, i = theToken(kept[a]), j = theToken(kept[b]);
  const missing = known || state.token === READ ? "" : ` The numbers of ${tokenName(state.token)} are not in the file: it has those of ${K} tokens of each head (with a dot above).`;
  find("numbers-says").textContent = `Layer ${l + 1}, head ${h + 1}; query i is ${i}, key j ${j}; what flows back comes from the logit of ${short(className(about.follow[state.follow].index))}. `
    + `d is ${D_HEAD}. Open a line to see it written out: a pocket calculator gives the same.${missing}`;
  const options = kept.map((token) => [token, tokenName(token)]).sort((x, y) => x[0] - y[0]);
  for (const [id, token] of [["query", kept[a]], ["key", kept[b]]])
    find(id).replaceChildren(...options.map(([value, text]) => new Option(text, value, false, value === token)));
  for (const number of [...FORWARD, ...BACK]) {
    number.shown.textContent = `${number.entry ? `[${e + 1}] ` : ""}= ${digits(number.value(where))}`;
    writeOut(number);
  }
  const head = make("tr", {}, ...["key j", "S", "P", "dP", "dS"].map((text, n) => make("th", n ? {scope: "col", class: "number"} : {scope: "col"}, text)));
  const order = range(K).sort((x, y) => pair("p", l, h, a, y) - pair("p", l, h, a, x));
  const rows = order.map((k) => {
    const row = make("tr", k === b ? {class: "marked"} : {}, make("th", {scope: "row"}, make("button", {type: "button"}, tokenName(kept[k]))),
      ...[["s", pair], ["p", pair], ["dp", pairFollowed], ["ds", pairFollowed]].map(([name, of]) => make("td", {class: "number"}, digits(of(name, l, h, a, k)))));
    row.addEventListener("click", () => {
      state.chosen.key = kept[k];
      drawNumbers();
      find("keys").querySelector(".marked button").focus({preventScroll: true});  // its table is made anew
    });
    return row;
  });
  find("keys").replaceChildren(make("caption", {}, `All that is between ${i} as query and its keys${ALL_KEPT ? "" : `, ${K} of ${T} tokens`}: score, attention, and their gradients`), make("thead", {}, head), make("tbody", {}, ...rows));
}

/**
 * Compute all numbers of the file again from those beside them, and the sums of the maps' rows: {count, worst, where, rows}.
 * `worst` is the largest difference from the engine's, relative to what is added up for the largest number of its vector.
 */
function check() {
  const found = {count: 0, worst: 0, where: "", rows: 0}, before = state.follow, entries = range(D_HEAD);
  for (const f of range(about.follow.length)) {
    state.follow = f;
    for (const l of range(L)) for (const h of range(H)) for (const a of range(K)) {
      for (const number of [...(f ? [] : FORWARD), ...BACK]) {
        if (number.given) continue;
        // of a vector or a row: the largest difference, beside the largest size
        const all = (number.entry ? entries : range(K)).map((x) => (number.entry ? {l, h, a, b: a, e: x} : {l, h, a, b: x, e: 0})), hand = all.map((where) => byHand(number, where, false));
        const off = Math.max(...hand.map(({result}, i) => Math.abs(result - number.value(all[i])))) / (Math.max(...hand.map(({size}) => size)) || 1);
        found.count += all.length;
        if (!(off <= found.worst)) Object.assign(found, {worst: off, where: `${number.name}: layer ${l + 1}, head ${h + 1}, token ${a + 1}`});
      }
    }
  }
  state.follow = before;
  for (const l of range(L)) for (const h of range(H)) for (const i of range(T))
    found.rows = Math.max(found.rows, Math.abs(attention(l, h, i).reduce((s, x) => s + x, 0) - 1));
  return found;
}
