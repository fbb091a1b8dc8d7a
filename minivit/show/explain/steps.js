// ---- the seven steps: each with its picture, shapes and numbers ----

/** The numbers of a patch as the model takes them, channel by channel, row by row: (pixel/255 − mean) / std; or a few of its features. */
function patchNumbers(n) {
  if (about.places) return vector("seen", n, about.arrays.seen.shape[1]);
  const [p, q] = about.patch, {width, height, channels} = about.image, raw = numbers("raw"), found = [];
  const top = Math.floor(n / COLUMNS) * p, left = (n % COLUMNS) * q;
  for (let c = 0; c < channels; c++)
    for (let y = 0; y < p; y++)
      for (let x = 0; x < q && top + y < height && left + x < width; x++)
        found.push((raw[(c * height + top + y) * width + left + x] / 255 - about.mean[c]) / about.std[c]);
  return found;
}

const shape = (...sizes) => sizes.join(" × ");
const some = (values, count = 4) => Array.from(values.slice(0, count), digits).join(", ") + (values.length > count ? ", …" : "");
/** Return a picture of a matrix, rows of `columns` numbers, or of a vector. */
function strip(values, columns, label) {
  const canvas = pixelsOf(values, columns, most(values) * 0.8, true);
  canvas.className = "strip";
  canvas.setAttribute("role", "img");
  canvas.setAttribute("aria-label", label);
  return canvas;
}
const patchOf = (token) => Math.max(0, (token === READ ? PREFIX + Math.floor(ROWS / 2) * COLUMNS + Math.floor(COLUMNS / 2) : token) - PREFIX);

/** Draw the image cut into patches, with gaps between; the patch that is followed has a frame. */
function cutUp(canvas, chosen) {
  const {width, height} = about.image, [p, q] = about.patch, sharp = window.devicePixelRatio || 1;
  const room = canvas.clientWidth || 200, gap = Math.max(1, Math.min(4, room / COLUMNS / 7)) * sharp;
  const x = (room * sharp - gap) / COLUMNS, y = (x * p) / q;
  [canvas.width, canvas.height] = [Math.round(room * sharp), Math.round(y * ROWS + gap)];
  const context = canvas.getContext("2d");
  context.imageSmoothingEnabled = width > 64;
  for (let r = 0; r < ROWS; r++)
    for (let c = 0; c < COLUMNS; c++) {
      if (r * COLUMNS + c === chosen) {
        context.fillStyle = "#f0883e";
        context.fillRect(c * x, r * y, x + gap, y + gap);
      }
      context.drawImage(plain, c * q, r * p, q, p, c * x + gap, r * y + gap, x - gap, y - gap);
    }
}

function card(number, title, picture, sizes, says, id) {
  return make("article", {class: "step"}, make("h3", {}, make("b", {}, String(number)), ` ${title}`),
    make("div", {class: "picture"}, ...picture), make("p", {class: "sizes"}, sizes), make("p", {}, says), make("div", {id}));
}

/** Return the cosine similarity of a token's position to all. */
function similarPositions(token) {
  const own = vector("positions", token, D), size = (v) => Math.hypot(...v) || 1;
  return Array.from({length: T}, (_, i) => {
    const other = vector("positions", i, D);
    return own.reduce((sum, x, j) => sum + x * other[j], 0) / (size(own) * size(other));
  });
}

const FROM = {class: "The class will be read from the class token", both: "The class will be read from the class token and that of distillation",
  mean: "The class will be read from the mean of all patches", map: "The class will be read from what attends to all patches", seq: "The class will be read from a weighted mean of all patches"};
const OUT = {class: ["Class token out", "After the last norm, the class token alone is read."], both: ["Two tokens out", "After the last norm, the class token and that of distillation are read, each by a head of its own; the logit is the mean of both."],
  mean: ["Mean of the patches", "After the last norm, the mean over the patches is read."], map: ["Attention over the patches", "After the last norm, a learned query attends to the patches, and what it gathers, through an MLP, is read."],
  seq: ["Weighted mean of the patches", "After the last norm, a linear map and a softmax weigh each patch, and the mean so weighed is read."]};
const BLOCK = {pre: "x + attention(norm(x)), then x + MLP(norm(x))", post: "norm(x + attention(x)), then norm(x + MLP(x))",
  res_post: "x + norm(attention(x)), then x + norm(MLP(x))", parallel: "x + attention(norm(x)) + MLP(norm(x))", between: "norm(x + attention(norm(x))), then x + MLP(x)"};

/** Make the seven cards; what depends on the patch in question is filled in by followPatch. */
function makeSteps() {
  const [p, q] = about.patch, {channels, width, height} = about.image, has = (name) => name in about.arrays;
  const embedded = () => strip(numbers("embedded"), D, "the patches' tokens, a row of numbers for each"), read = tokenName(READ);
  const cut = make("canvas", {class: "cut", id: "cut", role: "img", "aria-label": `the image in ${ROWS} × ${COLUMNS} patches`});
  cut.style.width = `${Math.min((126 * width) / height, 200)}px`;
  cut.addEventListener("pointermove", (event) => { if (event.pointerType === "mouse") point(event, cut, false); });
  cut.addEventListener("pointerleave", () => setToken(state.kept, false));
  cut.addEventListener("click", (event) => point(event, cut, true));
  const similar = make("canvas", {id: "similar", class: "grid", role: "img", "aria-label": "similarity of positions"});
  similar.style.width = `${Math.min(90, (120 * COLUMNS) / ROWS)}px`;
  const features = numbers("features"), logits = numbers("logits"), top = about.top;
  const wide = Math.ceil(features.length / Math.ceil(features.length / 32));
  const terms = about.tokenizer ? 0 : numbers("weight").length, [down, across] = about.places ?? [1, 1], made = terms / (down * across);
  const through = about.places ? `${shape(made, ROWS * down, COLUMNS * across)} → ` : "";
  const whatIsPatch = about.places
    ? `A ResNet comes first: ${made} features of every ${shape(p / down, q / across)} pixels, and of what is around them. A patch is ${down * across > 1 ? `${shape(down, across)} places` : "one place"} of its map, not pixels. Drawn is its place in the image.${about.image.remark}`
    : `${ROWS} × ${COLUMNS} patches of ${shape(p, q)} pixels, each ${about.tokenizer ? "the place of a token; its numbers are" : "a row of numbers"} (pixel/255 − mean)/std.${about.image.remark}`;
  find("steps").replaceChildren(
    card(1, "Patches", [cut], about.tokenizer ? shape(channels, height, width) : `${shape(channels, height, width)} → ${through}${shape(N, terms)}`, whatIsPatch, "patch-1"),
    card(2, "Patch embedding", [embedded()], about.tokenizer ? `${shape(channels, height, width)} → ${shape(N, D)}` : `${shape(N, terms)} → ${shape(N, D)}`,
      about.tokenizer ? `Tokens are made by ${about.tokenizer}.` : "A linear map makes a token of each patch x: E·x + b. The first of its numbers:", "patch-2"),
    card(3, PREFIX > 1 || (PREFIX && !CLASS) ? "Tokens beside" : "Class token", [PREFIX ? make("div", {class: "stack"}, strip(numbers("class_token"), D, "the numbers of the tokens before the patches"), embedded()) : make("div", {class: "nothing"}, "none")],
      PREFIX ? `${shape(N, D)} → ${shape(T, D)}` : shape(T, D),
      `${PREFIX > 1 ? `${PREFIX} learned tokens, the same for every image, go first: ${about.beside.join(", ")}.` : PREFIX ? "A learned token, the same for every image, goes first." : "There is none here:"} ${FROM[about.reads]}.`,
      "patch-3"),
    card(4, "Positions", [similar, strip(numbers("entering"), D, "the tokens that enter the encoder")], shape(T, D),
      has("positions") ? `A ${about.fixed ? "fixed" : "learned"} vector is added to each token, or patches had no order. Left: cosine of this patch's with each, blue −1, orange 1. Right: what enters the encoder.` : has("relative") ? "This model adds none here: where patches stand to each other is in the scores of its attention." : "This model adds none: to it, patches have no order.", "patch-4"),
    card(5, "Encoder", [makeLayers()], `${L} × (attention of ${H} heads of ${D_HEAD}, MLP of ${about.mlp})`,
      `${BLOCK[about.block]}, ${L} times. Drawn: where the ${read} looks in each layer, mean of the heads.`, "patch-5"),
    card(6, OUT[about.reads][0], [strip(features, wide, "the features that the class is read from")], `${shape(T, D)} → ${features.length}`,
      OUT[about.reads][1], "patch-6"),
    card(7, "Head", [bars(top.map((c) => ({name: className(c), value: about.probabilities[c], remark: c === about.label ? "label" : "", mark: c === top[0]})), percent)],
      `${features.length} → ${about.classes.length}`, "A linear map gives each class a logit; softmax makes probabilities of them.", "patch-7"));
  const weights = vector("head_weight", 0, features.length);
  say("patch-3", PREFIX ? some(numbers("class_token"), 3) : "");
  say("patch-5", `length of ${theToken(0)}: ${[0, L].map((l) => digits(vector("norms", l, T)[0])).join(" → ")}`);
  say("patch-6", some(features, 3));
  say("patch-7", `${digits(weights[0])}·${bracket(features[0])} + … + ${bracket(numbers("head_bias")[0])} = ${digits(logits[top[0]])}`,
    `e^${digits(logits[top[0]])} / ${digits(logits.reduce((s, z) => s + Math.exp(z), 0))} = ${percent(about.probabilities[top[0]])}`);
}

const say = (id, ...texts) => find(id).replaceChildren(...texts.filter(Boolean).map((text) => make("code", {}, text)));

function makeLayers() {
  const layers = make("div", {class: "layers"});
  layers.style.gridTemplateColumns = `repeat(${L < 6 ? L : L > 12 ? 8 : 6}, minmax(0, 1fr))`;
  for (let l = 0; l < L; l++) {
    const mean = mapRow("looks", l).slice(PREFIX), small = pixelsOf(mean, COLUMNS, most(mean), false);
    small.setAttribute("role", "img");
    small.style.width = `${Math.min(56, (112 * COLUMNS) / ROWS)}px`;
    small.setAttribute("aria-label", `layer ${l + 1}: where the ${tokenName(READ)} looks`);
    layers.append(make("figure", {}, small, make("figcaption", {}, String(l + 1))));
  }
  return layers;
}

/** Fill in the numbers of the patch that is pointed at; of one in the middle, where that is none. */
function followPatch() {
  const token = patchOf(state.token) + PREFIX, n = token - PREFIX, x = patchNumbers(n), words = tokenName(token);
  const first = vector("embedded", n, D), entering = vector("entering", token, D);
  cutUp(find("cut"), n);
  say("patch-1", `${words}: ${some(x, 3)}`);
  const made = () => {
    const weight = numbers("weight"), bias = numbers("bias")[0];
    const sum = about.places ? first[0] : x.reduce((s, a, i) => s + a * weight[i], bias);
    return `${digits(x[0])}·${bracket(weight[0])} + … (${weight.length} terms) + ${bracket(bias)} = ${digits(sum)}`;
  };
  say("patch-2", about.tokenizer ? "" : made(), `the token: ${some(first, 3)}`);
  const similar = "positions" in about.arrays;
  find("similar").hidden = !similar;
  if (similar) {
    say("patch-4", `${words}: ${digits(first[0])} + ${bracket(vector("positions", token, D)[0])} = ${digits(entering[0])}`);
    const small = pixelsOf(similarPositions(token).slice(PREFIX), COLUMNS, 1, true), canvas = find("similar");
    [canvas.width, canvas.height] = [COLUMNS, ROWS];
    canvas.getContext("2d").drawImage(small, 0, 0);
  } else say("patch-4", some(entering, 3));
}

/** Return a picture of a value for each patch. */
function gridPicture(values, largest, signed, label) {
  const canvas = pixelsOf(values, COLUMNS, largest, signed);
  canvas.className = "grid";
  canvas.setAttribute("role", "img");
  canvas.setAttribute("aria-label", label);
  return canvas;
}
