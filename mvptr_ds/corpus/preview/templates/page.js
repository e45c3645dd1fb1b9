// A phrase lights its words and its regions, a region the phrases that name it: on hover and focus, and on click
// until the next click elsewhere or Escape.
"use strict";
(() => {
  let pinned = null;

  const list = (node, name) => (node.dataset[name] || "").split(" ").filter(Boolean);

  const clear = () => {
    document.querySelectorAll(".lit, .dimmed").forEach((node) => node.classList.remove("lit", "dimmed"));
    document.querySelectorAll("[aria-pressed]").forEach((node) => node.removeAttribute("aria-pressed"));
  };

  const light = (node) => {
    clear();
    const card = node && node.closest(".card");
    if (!card) return;
    const phrases = new Set(list(node, "p"));
    const regions = new Set(list(node, "r"));
    for (const button of card.querySelectorAll("button.phrase")) {
      const named = list(button, "r");
      if (phrases.has(button.dataset.p)) named.forEach((region) => regions.add(region));
      else if (!phrases.size && named.some((region) => list(node, "r").includes(region))) phrases.add(button.dataset.p);
    }
    for (const marked of card.querySelectorAll("[data-p], [data-r]")) {
      const isPhrase = marked.dataset.p !== undefined;
      const lit = isPhrase ? list(marked, "p").some((p) => phrases.has(p)) : regions.has(marked.dataset.r);
      marked.classList.toggle("lit", lit);
    }
    const drawing = card.querySelector(".picture svg");
    if (drawing) drawing.classList.toggle("dimmed", regions.size > 0);
    if (node === pinned) node.setAttribute("aria-pressed", "true");
  };

  const target = (event) => (event.target.closest ? event.target.closest("[data-p], [data-r]") : null);

  document.addEventListener("pointerover", (event) => light(target(event) || pinned));
  document.addEventListener("focusin", (event) => light(target(event) || pinned));
  document.addEventListener("click", (event) => {
    const node = target(event);
    pinned = node === pinned ? null : node;
    light(pinned);
  });
  document.addEventListener("keydown", (event) => {
    if (event.key !== "Escape") return;
    pinned = null;
    clear();
  });
})();
