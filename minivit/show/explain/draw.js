// ---- colours: their lightness rises evenly; signed values go from blue to orange, which colour-blind people tell apart ----

const HEAT = [[13, 8, 50], [87, 16, 110], [188, 55, 84], [249, 142, 9], [252, 245, 160]];
const SIGNED = {
  light: [[5, 48, 115], [67, 133, 197], [245, 245, 245], [236, 140, 56], [143, 57, 0]],
  dark: [[132, 196, 255], [40, 110, 190], [26, 31, 38], [196, 98, 16], [255, 190, 120]],
};
const dark = matchMedia("(prefers-color-scheme: dark)");

function mix(stops, x) {  // x of 0 to 1
  const place = Math.min(Math.max(x, 0), 1) * (stops.length - 1), i = Math.min(Math.floor(place), stops.length - 2), t = place - i;
  return stops[i].map((c, n) => c + (stops[i + 1][n] - c) * t);
}
const table = (stops) => Uint8ClampedArray.from(Array.from({length: 256}, (_, i) => mix(stops, i / 255)).flat());
const TABLES = {heat: table(HEAT), light: table(SIGNED.light), dark: table(SIGNED.dark)};

/** Return a canvas with a pixel for each value, row by row; 0 to `most`, or where they have a sign −most to most. */
function pixelsOf(values, columns, most, signed, veil = false) {
  const rows = Math.ceil(values.length / columns), canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [columns, rows];
  const context = canvas.getContext("2d"), image = context.createImageData(columns, rows);
  const colours = signed ? TABLES[veil ? "light" : dark.matches ? "dark" : "light"] : TABLES.heat, scale = most > 0 ? 1 / most : 0;
  for (let i = 0; i < values.length; i++) {
    const x = values[i] * scale, at = 3 * Math.round(255 * Math.min(Math.max(signed ? (x + 1) / 2 : x, 0), 1));
    image.data.set(colours.subarray(at, at + 3), 4 * i);
    // over an image, what is near 0 lets it be seen
    image.data[4 * i + 3] = veil ? 255 * (signed ? 0.12 + 0.8 * Math.min(Math.abs(x), 1) : 0.5 + 0.32 * Math.min(x, 1)) : 255;
  }
  context.putImageData(image, 0, 0);
  return canvas;
}

/** Fill a canvas on the page with another, sharp; it is as wide as it is shown. */
function fill(canvas, source, width, height) {
  const sharp = window.devicePixelRatio || 1;
  [canvas.width, canvas.height] = [Math.round(width * sharp), Math.round(height * sharp)];
  const context = canvas.getContext("2d");
  context.imageSmoothingEnabled = false;
  context.drawImage(source, 0, 0, canvas.width, canvas.height);
  return context;
}

/** The image as the model gets it, in its own pixels: in colour, and in grey to draw maps on. */
function imageCanvas(grey) {
  const {width, height, channels} = about.image, raw = numbers("raw"), size = width * height;
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [width, height];
  const context = canvas.getContext("2d"), data = context.createImageData(width, height);
  for (let i = 0; i < size; i++) {
    const [r, g, b] = channels >= 3 ? [raw[i], raw[size + i], raw[2 * size + i]] : [raw[i], raw[i], raw[i]];
    const light = 0.299 * r + 0.587 * g + 0.114 * b;
    data.data.set(grey ? [light, light, light, 255] : [r, g, b, 255], 4 * i);
  }
  context.putImageData(data, 0, 0);
  return canvas;
}
const plain = imageCanvas(false), grey = imageCanvas(true);
const most = (values) => values.reduce((m, x) => Math.max(m, Math.abs(x)), 0);

/** Draw the image under a map of its patches; the patch of `token` and those in `dotted` are marked. */
function drawOver(canvas, row, signed, token, dotted = []) {
  const patches = row.slice(PREFIX), {width, height} = about.image;
  const w = canvas.clientWidth || 320, h = (w * height) / width, sharp = window.devicePixelRatio || 1;
  const [wide, high] = [Math.round(w * sharp), Math.round(h * sharp)];
  if (canvas.width !== wide || canvas.height !== high) [canvas.width, canvas.height] = [wide, high];
  const context = canvas.getContext("2d"), x = canvas.width / COLUMNS, y = canvas.height / ROWS;
  context.imageSmoothingEnabled = width > 64;
  context.drawImage(grey, 0, 0, canvas.width, canvas.height);
  context.imageSmoothingEnabled = false;
  context.drawImage(pixelsOf(patches, COLUMNS, most(patches), signed, true), 0, 0, canvas.width, canvas.height);
  context.lineWidth = Math.max(1, Math.round(sharp));
  context.strokeStyle = "rgb(255 255 255 / 0.25)";
  context.beginPath();
  if (Math.min(x, y) > 9) {
    for (let c = 1; c < COLUMNS; c++) { context.moveTo(c * x, 0); context.lineTo(c * x, canvas.height); }
    for (let r = 1; r < ROWS; r++) { context.moveTo(0, r * y); context.lineTo(canvas.width, r * y); }
  }
  context.stroke();
  const place = (i) => [((i - PREFIX) % COLUMNS) * x, Math.floor((i - PREFIX) / COLUMNS) * y];
  const dot = Math.max(1.5 * sharp, Math.min(x, y) / 16);
  context.fillStyle = "rgb(255 255 255 / 0.8)";
  for (const i of dotted) {
    if (i < PREFIX) continue;
    const [left, top] = place(i);
    context.beginPath();
    context.arc(left + 2.4 * dot, top + 2.4 * dot, dot, 0, 7);
    context.fill();
  }
  if (token >= PREFIX) {
    const [left, top] = place(token), line = Math.max(2, 2.5 * sharp);
    for (const [colour, wider] of [["#000", 2 * sharp], ["#fff", 0]]) {
      context.lineWidth = line + wider;
      context.strokeStyle = colour;
      context.strokeRect(left + line / 2, top + line / 2, x - line, y - line);
    }
  }
}

/** Return bars from 0 to the right, or both ways where some are negative, as a table that can be read aloud. */
function bars(rows, unit = digits) {
  const low = Math.min(0, ...rows.map((row) => row.value)), high = Math.max(0, ...rows.map((row) => row.value));
  const span = high - low || 1, remarks = rows.some((row) => row.remark), body = make("table", {class: "bars"});
  for (const {name, value, remark, mark} of rows) {
    const bar = make("i", {class: value < 0 ? "below" : "above"});
    bar.style.left = `${(100 * (Math.min(value, 0) - low)) / span}%`;
    bar.style.width = `${(100 * Math.abs(value)) / span}%`;
    body.append(make("tr", mark ? {class: "marked"} : {}, make("th", {scope: "row", title: name}, short(name)),
      make("td", {class: "bar"}, make("span", {}, bar)), make("td", {class: "number"}, unit(value)), ...(remarks ? [make("td", {class: "remark", title: remark || ""}, remark || "")] : [])));
  }
  return body;
}

/** Return a chart of signed columns in groups: [{name, bars: [{name, value, kind}]}]. */
function columns(groups) {
  const values = groups.flatMap((group) => group.bars.map((bar) => bar.value)), low = Math.min(0, ...values), high = Math.max(0, ...values);
  const count = values.length + groups.length, width = 460, height = 230, top = 14, bottom = 20, left = 4, step = (width - left) / count;
  const y = (value) => top + ((high - value) / (high - low || 1)) * (height - top - bottom);
  const svg = (tag, attributes, ...children) => {
    const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    made.append(...children);
    return made;
  };
  const chart = svg("svg", {viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": "direct attribution: the same numbers are in the table below"});
  let x = left;
  groups.forEach(({name, bars: own}, n) => {
    const wide = step * (own.length + 1);
    if (n % 2) chart.append(svg("rect", {class: "band", x, y: 0, width: wide, height: height - 4}));
    chart.append(svg("text", {x: x + wide / 2, y: height - 7, "text-anchor": "middle"}, name));
    own.forEach((bar, i) => {
      const at = y(Math.max(bar.value, 0)), tall = Math.max(0.8, Math.abs(y(bar.value) - y(0)));
      chart.append(svg("rect", {class: `${bar.kind}-bar`, x: x + step * (i + 0.6), y: at, width: Math.max(1, step * 0.8), height: tall},
        svg("title", {}, `${bar.name}: ${digits(bar.value)}`)));
    });
    x += wide;
  });
  chart.append(svg("line", {class: "zero", x1: left, x2: width, y1: y(0), y2: y(0)}));
  const largest = high >= -low ? high : low;
  chart.append(svg("text", {x: left + 2, y: 10}, `largest ${digits(largest)}`));
  return chart;
}
