"use strict";
(function () {
  const pictures = JSON.parse(document.getElementById("map-pictures").textContent);
  const map = document.getElementById("map");
  const tip = document.getElementById("tip");

  function show(mark) {
    tip.replaceChildren();
    const picture = pictures[mark.dataset.mark];
    if (picture) {
      const image = document.createElement("img");
      image.src = picture;
      image.alt = "image " + mark.dataset.ids;
      tip.append(image);
    }
    const text = document.createElement("span");
    text.textContent = mark.dataset.ids + (mark.dataset.right === "1" ? ": found" : ": not found") + " at first try";
    tip.append(text);
    tip.hidden = false;
    const box = mark.getBoundingClientRect();
    const left = Math.min(box.right + 8, document.documentElement.clientWidth - tip.offsetWidth - 8);
    const below = box.bottom + 8 + tip.offsetHeight > window.innerHeight;
    tip.style.left = Math.max(8, left) + window.scrollX + "px";
    tip.style.top = (below ? box.top - tip.offsetHeight - 8 : box.bottom + 8) + window.scrollY + "px";
  }

  for (const kind of ["pointerover", "click"]) {
    map.addEventListener(kind, function (event) {
      const mark = event.target.closest("[data-mark]");
      if (mark) { show(mark); } else { tip.hidden = true; }
    });
  }
  map.addEventListener("pointerleave", function (event) {
    if (event.pointerType === "mouse") { tip.hidden = true; }
  });

  const words = document.getElementById("filter-words");
  const dataset = document.getElementById("filter-dataset");
  const answer = document.getElementById("filter-answer");
  const count = document.getElementById("filter-count");
  const marks = Array.from(map.querySelectorAll("[data-mark]"));
  const examples = Array.from(document.querySelectorAll("article[data-ids]"));

  function apply() {
    const wanted = words.value.trim().toLowerCase();
    let shown = [0, 0];
    [marks, examples].forEach(function (elements, place) {
      for (const element of elements) {
        const data = element.dataset;
        const kept = data.ids.toLowerCase().includes(wanted)
          && (!dataset.value || data.dataset.split(" ").includes(dataset.value))
          && (!answer.value || data.right === undefined || data.right === answer.value);
        element.classList.toggle("away", !kept);
        shown[place] += kept ? 1 : 0;
      }
    });
    count.textContent = `${shown[0]} of ${marks.length} marks, ${shown[1]} of ${examples.length} examples`;
  }
  for (const control of [words, dataset, answer]) { control.addEventListener("input", apply); }
  document.getElementById("filter").hidden = false;
  apply();
})();
