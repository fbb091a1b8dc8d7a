// ---- the matrix of heads, and the one that is open ----

const cells = [];

function makeMatrix() {
  const matrix = find("matrix");
  const ratio = about.image.width / about.image.height;  // a cell's picture is as the image is, the longer side about this long:
  const wide = Math.round(Math.min(Math.max(640 / L, 44), 118, 560 / H) * Math.min(ratio < 1 ? ratio : 1 + (ratio - 1) / 2, 3));
  matrix.style.gridTemplateColumns = `auto repeat(${H}, minmax(0, ${wide}px))`;
  matrix.classList.toggle("many", H > 6);
  for (let l = 0; l < L; l++) {
    const row = make("div", {role: "row", class: "row"}, make("span", {role: "rowheader"}, String(l + 1)));
    for (let h = 0; h < H; h++) {
      const canvas = make("canvas", {"aria-hidden": "true"}), cell = make("button", {type: "button", role: "gridcell", tabindex: "-1"}, canvas);
      cell.addEventListener("click", () => open(l, h, true));
      cells.push({cell, canvas});
      row.append(cell);
    }
    matrix.append(row);
  }
}

/** Draw every small map: each to its own largest value. */
function drawMatrix() {
  const kind = KINDS[state.kind];
  cells.forEach(({cell, canvas}, at) => {
    const l = Math.floor(at / H), h = at % H;
    const row = kind.all ? kind.part(l, h) : rowOf((i) => kind.part(l, h, i), state.kept), patches = row.slice(PREFIX), largest = most(patches);
    const small = pixelsOf(patches, COLUMNS, largest, kind.signed);
    [canvas.width, canvas.height] = [COLUMNS, ROWS];
    canvas.getContext("2d").drawImage(small, 0, 0);
    canvas.style.aspectRatio = `${about.image.width} / ${about.image.height}`;
    const where = patches.reduce((best, x, i) => (Math.abs(x) > Math.abs(patches[best]) ? i : best), 0);
    cell.setAttribute("aria-label", `layer ${l + 1}, head ${h + 1}: ${kind.name} of ${theToken(state.kept)}, largest at ${tokenName(where + PREFIX)}, ${digits(patches[where])}`);
    cell.title = `layer ${l + 1}, head ${h + 1}: largest ${digits(patches[where])}`;
  });
  find("matrix-says").textContent = `Layers from top to bottom, heads from left to right; ${kind.all ? "of all queries" : `the row of ${theToken(state.kept)}`}. Each map to its own largest value.`;
}

function markOpen() {
  cells.forEach(({cell}, at) => {
    const opened = at === state.layer * H + state.head;
    cell.classList.toggle("opened", opened);
    cell.setAttribute("aria-selected", String(opened));
    cell.tabIndex = opened ? 0 : -1;
  });
}

const keptTokens = (l, h) => numbers("kept").subarray((l * H + h) * K, (l * H + h + 1) * K);

/** Draw the open head's row of the token that is pointed at: over the image, and its P and dP beside it. */
function drawStage() {
  const kind = KINDS[state.kind], {layer: l, head: h, token} = state;
  const row = kind.whole ? (kind.all ? kind.whole() : rowOf(kind.whole, token)) : rowOf((i) => kind.part(l, h, i), token);
  const p = rowOf((i) => attention(l, h, i), token), dp = rowOf((i) => gradient(l, h, i), token);
  drawOver(find("big"), row, kind.signed, token, K < T && state.numbers ? keptTokens(l, h) : []);
  drawOver(find("row-p"), p, false, token);
  drawOver(find("row-dp"), dp, true, token);
  const patches = row.slice(PREFIX), largest = most(patches), where = patches.reduce((b, x, i) => (Math.abs(x) > Math.abs(patches[b]) ? i : b), 0);
  find("opened").textContent = kind.whole ? `Whole model: ${kind.name}` : `Layer ${l + 1}, head ${h + 1}: ${kind.name}`;
  drawLegend(largest, kind.signed);
  const own = PREFIX ? `, ${about.beside[0]} ${digits(row[0])}` : "", of = kind.all ? "All queries" : capital(tokenName(token));
  const sum = row.reduce((s, x) => s + x, 0), sums = kind.signed || kind.all ? "" : `; the row sums to ${sum.toFixed(2)}`;
  const name = kind.signed || kind.all ? "largest at" : "most to";
  find("readout").textContent = largest === 0 ? `${of}: all zero. ${zeroText(kind)}`
    : `${of}: ${name} ${tokenName(where + PREFIX)} (${digits(patches[where])})${own}${sums}.`;
  find("big").setAttribute("aria-label", `the image under ${kind.name}; ${find("readout").textContent} Arrows move from patch to patch.`);
  find("row-p").setAttribute("aria-label", `attention of ${theToken(token)}`);
  find("row-dp").setAttribute("aria-label", `gradient of the attention of ${theToken(token)}`);
  for (const [i, button] of [...find("tokens").children].entries()) button.setAttribute("aria-pressed", String(i === 0 ? token < PREFIX : false));
}
const capital = (text) => text[0].toUpperCase() + text.slice(1);
function zeroText(kind) {
  const last = state.layer === L - 1 && CLASS && state.token >= PREFIX && !kind.whole;
  return last ? `After the last layer only the class token${about.reads === "both" ? " and that of distillation are" : " is"} read: what other tokens attend to there reaches no logit.` : "";
}

function drawLegend(largest, signed) {
  const steps = Array.from({length: 64}, (_, i) => (signed ? (i / 63) * 2 - 1 : i / 63)), scale = pixelsOf(steps, 64, 1, signed, signed);
  scale.setAttribute("aria-hidden", "true");
  find("legend").replaceChildren(signed ? digits(-largest) : "0", scale, digits(largest));
}

// ---- what the reader does ----

/** Follow the patch under the pointer; a click keeps it. */
function point(event, canvas, keep) {
  const box = canvas.getBoundingClientRect();
  const c = Math.floor(((event.clientX - box.left) / box.width) * COLUMNS), r = Math.floor(((event.clientY - box.top) / box.height) * ROWS);
  if (r >= 0 && r < ROWS && c >= 0 && c < COLUMNS) setToken(PREFIX + r * COLUMNS + c, keep);
}

function setToken(token, keep) {
  if (token === state.token && !keep) return;
  state.token = token;
  if (keep) state.kept = token;
  drawStage();  // at once: what is under the pointer; the rest in the next frame
  wanted.numbers = wanted.steps = true;
  wanted.matrix ||= keep;
  later();
}

function open(layer, head, scroll) {
  [state.layer, state.head] = [(layer + L) % L, (head + H) % H];
  markOpen();
  if (KINDS[state.kind].whole) setKind({rollout: 0, relevance: 2, LeGrad: 1}[KINDS[state.kind].name]);
  if (scroll && matchMedia("(max-width: 720px)").matches) find("stage").scrollIntoView({block: "start"});
  wanted.stage = wanted.numbers = true;
  later();
}

function setKind(kind) {
  state.kind = kind;
  for (const [i, button] of [...find("kinds").children].entries()) {
    button.setAttribute("aria-checked", String(i === kind));
    button.tabIndex = i === kind ? 0 : -1;
  }
  find("says").textContent = KINDS[kind].says;
  wanted.stage = wanted.matrix = true;
  later();
}

function follow(n) {
  state.follow = n;
  for (const [i, button] of [...find("follow").querySelectorAll("button")].entries()) button.setAttribute("aria-pressed", String(i === n));
  for (const part in wanted) wanted[part] = part !== "steps";
  later();
}
