"""The script of a picture that folds: it unfolds a part on a click or a key, and moves what is below.

It names nothing from outside of the picture, and holds neither < nor &, so that it is the same text in SVG and in HTML.
"""

from __future__ import annotations

SCRIPT = """
(() => {
  const svg = document.querySelector("svg.tape");
  const items = [...svg.querySelectorAll(".item")], arcs = [...svg.querySelectorAll(".far")];
  const folds = items.map(item => item.querySelector(".fold"));
  const all = svg.querySelector("#all");
  const isOpen = i => folds[i] !== null ? folds[i].getAttribute("aria-expanded") === "true" : false;

  function place() {  // the items one below the other, and the arcs between them
    const gap = Number(svg.dataset.gap), tops = [];
    let y = Number(svg.dataset.top);
    items.forEach((item, i) => {
      tops.push(y);
      item.setAttribute("transform", `translate(0 ${y})`);
      y += Number(isOpen(i) ? item.dataset.open : item.dataset.height) + gap;
    });
    for (const arc of arcs) {
      const [start, stop] = [arc.dataset.from, arc.dataset.to].map(ends => {
        const [i, folded, unfolded] = ends.split(" ").map(Number);
        return tops[i] + (isOpen(i) || folds[i] === null ? unfolded : folded);
      });
      const [line, tip] = arc.children;
      line.setAttribute("d", line.getAttribute("d")
        .replace(/^(M\\S+ )\\S+?H/, `$1${start}H`).replace(/V\\S+?q/, `V${stop - 6}q`));
      tip.setAttribute("d", tip.getAttribute("d").replace(/^(M\\S+ )\\S+?l/, `$1${stop}l`));
    }
    svg.setAttribute("height", y);
    svg.setAttribute("viewBox", `0 0 ${svg.getAttribute("width")} ${y}`);
    svg.querySelector(".paper").setAttribute("height", y);
    const open = folds.every((fold, i) => fold === null ? true : isOpen(i));
    all.querySelector("text").lastChild.data = open ? " fold all" : " unfold all";
    all.querySelector(".marker").textContent = open ? "\\u25be" : "\\u25b8";
  }

  function set(i, open) {
    folds[i].setAttribute("aria-expanded", open);
    folds[i].querySelector(".marker").textContent = open ? "\\u25be" : "\\u25b8";
    items[i].querySelector(".inner").setAttribute("display", open ? "inline" : "none");
  }

  function when(element, act) {
    element.addEventListener("click", act);
    element.addEventListener("keydown", event => {
      if (event.key === "Enter" || event.key === " ") { event.preventDefault(); act(); }
    });
  }

  folds.forEach((fold, i) => {
    if (fold === null) return;
    fold.setAttribute("role", "button");
    fold.setAttribute("tabindex", "0");
    set(i, false);
    when(fold, () => { set(i, !isOpen(i)); place(); });
  });
  when(all, () => {
    const open = !folds.every((fold, i) => fold === null ? true : isOpen(i));
    folds.forEach((fold, i) => { if (fold !== null) set(i, open); });
    place();
  });
  if (folds.some(fold => fold !== null)) all.setAttribute("display", "inline");
  place();
})();
"""
