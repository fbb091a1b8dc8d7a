// ---- what is chosen, what has to be drawn, and what keys do ----

const state = {kind: 0, follow: 0, layer: L - 1, head: about.opened, token: READ, kept: READ, numbers: true, chosen: {key: -1, entry: 0}};
const wanted = {stage: true, matrix: true, steps: true, numbers: true, rest: true};
let waiting = false;

/** Draw in the next frame what is wanted. */
function later() {
  if (!waiting) requestAnimationFrame(draw);
  waiting = true;
}
function draw() {
  waiting = false;
  const parts = {stage: drawStage, steps: followPatch, numbers: drawNumbers, matrix: drawMatrix, rest: drawRest};
  for (const [part, drawPart] of Object.entries(parts)) if (wanted[part]) {
    wanted[part] = false;
    drawPart();
  }
}

// ---- lens, attribution, sizes ----

function drawRest() {
  const {index} = about.follow[state.follow], F = about.follow.length, name = short(className(index)), lens = numbers("lens");
  find("lens").replaceChildren(bars(range(L + 1).map((l) => ({
    name: l ? `after layer ${l}` : "embedding", value: lens[l * F + state.follow],
    remark: `${percent(numbers("lens_probability")[l * F + state.follow])}; first: ${short(className(numbers("lens_top")[l]), 12)}`,
    mark: l === L}))));
  find("lens-says").textContent = `The logit of ${name} if the head read the ${tokenName(READ)} after each layer already; its probability, and which class would come first. The head was trained for the last layer only.`;
  drawDirect(name, index);
  drawFlow(name);
}

function drawDirect(name, index) {
  const direct = numbers("direct"), terms = about.terms.length;
  if (!direct) {
    find("direct-says").textContent = "The logit of this model is no sum of what the layers write: there is a hidden layer with tanh before it, attention that pools, or a norm at each branch's end.";
    return;
  }
  const values = about.terms.map((term, i) => ({name: term, value: direct[state.follow * terms + i]}));
  const kindOf = (term) => (/head \d+$/.test(term) ? "head" : /MLP$/.test(term) ? "mlp" : "other");
  const groups = [];
  for (const {name: term, value} of values) {
    const group = /^layer (\d+)/.exec(term)?.[1] ?? (groups.length ? "out" : "in");
    if (groups.at(-1)?.name !== group) groups.push({name: group, bars: []});
    groups.at(-1).bars.push({name: term, value, kind: kindOf(term)});
  }
  const legend = [["head", "heads"], ["mlp", "MLPs"], ["other", "embedding, biases"]].flatMap(([kind, text]) => [make("i", {class: `key ${kind}-bar`}), text]);
  find("direct").replaceChildren(columns(groups), make("p", {class: "small"}, ...legend), make("details", {}, make("summary", {}, `the ${terms} terms`), bars(values)));
  find("direct-says").textContent = `The logit of ${name} as a sum of what embedding, heads and MLPs write to the ${tokenName(READ)}, layer by layer: they add up to ${digits(values.reduce((s, t) => s + t.value, 0))}, and the logit is ${digits(numbers("logits")[index])}. The last norm's scale is held as it is.`;
}

function drawFlow(name) {
  const rows = [["norms", "‖x‖", (l) => vector("norms", l, T)], ["flow", "‖∂ logit/∂x‖", (l) => vector("flow", state.follow * (L + 1) + l, T)]];
  const figures = rows.map(([id, title, of]) => make("div", {class: "layers"}, make("b", {}, title), ...range(L + 1).map((l) => {
    const row = of(l), patches = row.slice(PREFIX), text = digits(most(patches)), small = gridPicture(patches, most(patches), false, `${title} of each patch ${l ? `after layer ${l}` : "as embedded"}, at most ${text}`);
    return make("figure", {title: PREFIX ? `${about.beside[0]}: ${digits(row[0])}` : ""}, small, make("figcaption", {}, l ? String(l) : "in", make("br"), text));
  })));
  find("flow").replaceChildren(...figures);
  find("flow-says").textContent = `As they enter, and after each layer: each map to its own largest value, which stands under it. Above, the length of each token; a few that are much longer than the rest are a known habit of large models (Darcet et al. 2023). Below, the gradient of the logit of ${name}: which tokens it still depends on.`;
}

function makeClasses() {
  const box = find("all"), count = about.classes.length;
  box.querySelector("summary").textContent = `${count.toLocaleString("en")} classes with their logits and probabilities, likeliest first`;
  box.addEventListener("toggle", () => {
    const logits = numbers("logits"), order = range(count).sort((a, b) => logits[b] - logits[a]);
    box.querySelector("table").replaceChildren(make("thead", {}, make("tr", {}, ...["class", "logit", "probability"].map((text) => make("th", {scope: "col"}, text)))),
      make("tbody", {}, ...order.map((c) => make("tr", c === about.label ? {class: "marked"} : {}, make("th", {scope: "row"}, className(c)),
        make("td", {class: "number"}, digits(logits[c])), make("td", {class: "number"}, percent(about.probabilities[c]))))));
  }, {once: true});
}

// ---- buttons and keys ----

function makeControls() {
  KINDS.forEach(({name}, i) => {
    const button = make("button", {type: "button", role: "radio"}, name);
    button.addEventListener("click", () => setKind(i));
    find("kinds").append(button);
  });
  find("follow").append("Followed back from the logit of ");
  about.follow.forEach(({index, role}, i) => {
    const button = make("button", {type: "button", title: className(index)}, short(className(index), 24), " ", make("small", {}, role));
    button.addEventListener("click", () => follow(i));
    find("follow").append(button);
  });
  const read = make("button", {type: "button"}, tokenName(READ));
  read.addEventListener("click", () => setToken(READ, true));
  find("tokens").append(read);
  for (const id of ["big", "row-p", "row-dp"]) {
    const canvas = find(id);
    canvas.style.maxWidth = `${((id === "big" ? 640 : 240) * about.image.width) / about.image.height}px`;  // of tall images
    canvas.addEventListener("pointermove", (event) => { if (event.pointerType === "mouse") point(event, canvas, false); });
    canvas.addEventListener("pointerleave", () => setToken(state.kept, false));
    canvas.addEventListener("click", (event) => point(event, canvas, true));
  }
}

const ARROWS = {ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0]};
function pressed(event) {
  const {key, target} = event, arrow = ARROWS[key];
  if (event.ctrlKey || event.metaKey || event.altKey || /^(INPUT|SELECT|TEXTAREA)$/.test(target.tagName)) return;
  if (arrow && target.id === "big") {
    const n = state.token === READ ? 0 : state.token - PREFIX, r = Math.floor(n / COLUMNS), c = n % COLUMNS;
    const to = state.token === READ ? 0 : ((r + arrow[0] + ROWS) % ROWS) * COLUMNS + ((c + arrow[1] + COLUMNS) % COLUMNS);
    setToken(PREFIX + Math.max(0, to), true);
  } else if (arrow && target.getAttribute("role") === "radio") {
    setKind((state.kind + arrow[0] + arrow[1] + KINDS.length) % KINDS.length);
    find("kinds").children[state.kind].focus();
  } else if (arrow) {
    open(state.layer + arrow[0], state.head + arrow[1], false);
    if (target.closest("#matrix")) cells[state.layer * H + state.head].cell.focus();
  } else if (key === "t" || key === "T") setKind((state.kind + (event.shiftKey ? KINDS.length - 1 : 1)) % KINDS.length);
  else if (key === "c" || key === "C") follow((state.follow + 1) % about.follow.length);
  else if (key === "Escape") setToken(READ, true);
  else return;
  event.preventDefault();
}

makeControls();
makeSteps();
makeMatrix();
makeNumbers();
makeClasses();
markOpen();
setKind(0);
follow(0);
wanted.steps = true;
find("made").textContent = about.made;
if (K < T) find("dots").textContent = `Dots mark the ${K} tokens of a head whose numbers stand below.`;
document.addEventListener("keydown", pressed);
const again = () => {
  makeSteps();
  for (const part in wanted) wanted[part] = true;
  later();
};
dark.addEventListener("change", again);
addEventListener("resize", () => { wanted.stage = wanted.steps = true; later(); });
draw();
