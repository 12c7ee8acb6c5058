  // Terms: where a word of the glossary stands first in a part, it opens its definition. In a table
  // header, which sorts, a mark behind the title does; a number's panel says what its column means.
  var glossary = [], wordPattern = null;
  (function () {
    var source = document.getElementById("glossary"), byWord = {};
    if (!source) { return; }
    JSON.parse(source.textContent).forEach(function (entry) {
      entry.words.forEach(function (word) { byWord[word.toLowerCase()] = { word: word, entry: entry }; });
    });
    glossary = byWord;
    var words = Object.keys(byWord).sort(function (a, b) { return b.length - a.length; });
    words = words.map(function (word) { return word.replace(/[/.+]/g, "\\$&").replace(/ /g, "\\s+"); });
    wordPattern = new RegExp("(^|[^\\w/-])(" + words.join("|") + ")(?![\\w/-])", "gi");
  })();

  function nextTerm(text, from) {  // where, what is written, its entry; an acronym is in capitals
    wordPattern.lastIndex = from;
    for (var match; (match = wordPattern.exec(text));) {
      var term = glossary[match[2].toLowerCase().replace(/\s+/g, " ")], at = match.index + match[1].length;
      if (term.word === term.word.toLowerCase() || term.word === match[2]) {
        return { at: at, text: match[2], entry: term.entry };
      }
      wordPattern.lastIndex = at + match[2].length;
    }
    return null;
  }
  function meaningOf(text) {
    var term = wordPattern && nextTerm(text, 0);
    return term ? term.entry.meaning : "";
  }

  function markTerms(part) {
    var seen = new Map();
    if (!panel || !part || !wordPattern) { return; }
    function open(control, entry) {
      var name = document.createElement("b"), text = document.createElement("p"), more = document.createElement("a");
      name.textContent = entry.name;
      text.textContent = entry.meaning.charAt(0).toUpperCase() + entry.meaning.slice(1) + ".";
      more.href = "#" + entry.anchor;
      more.textContent = "Formula";
      more.addEventListener("click", function () { panel.close(); });
      panel.open(control, "What the word means", [name, text].concat(document.getElementById(entry.anchor) ? [more, " "] : []));
    }
    function control(entry, label) {
      var button = document.createElement("button");
      button.type = "button";
      button.className = "term";
      button.setAttribute("aria-haspopup", "dialog");
      if (label) { button.setAttribute("aria-label", label); }
      button.addEventListener("click", function () { open(button, entry); });
      return button;
    }
    function isFirst(node, entry) {
      var scope = node.closest("figure, details.job, section, main");
      if (!seen.has(scope)) { seen.set(scope, new Set()); }
      return !seen.get(scope).has(entry) && seen.get(scope).add(entry);
    }
    function inText(node) {
      for (var term = nextTerm(node.data, 0); term; term = nextTerm(node.data, term.at + term.text.length)) {
        if (!isFirst(node.parentElement, term.entry)) { continue; }
        var word = node.splitText(term.at), button = control(term.entry);
        node = word.splitText(term.text.length);
        button.append(word.data);
        word.replaceWith(button);
        term = { at: 0, text: "" };
      }
    }
    function mark(root) {
      root.querySelectorAll("table.data thead th").forEach(function (th) {
        var term = nextTerm(th.textContent, 0);
        if (!term || !isFirst(th, term.entry)) { return; }
        var button = control(term.entry, "What this column means");
        button.dataset.shows = "?";
        th.append(button);
      });
      var texts = [], walker = document.createTreeWalker(root, NodeFilter.SHOW_TEXT);
      while (walker.nextNode()) { texts.push(walker.currentNode); }
      texts.forEach(function (node) {
        if (node.parentElement.closest(".output, p, li, figcaption, td") && nextTerm(node.data, 0) &&
            !node.parentElement.closest("a, button, summary, label, pre, code, svg, math, th, #definitions, table.plan")) {
          inText(node);
        }
      });
    }
    part.querySelectorAll(":scope > :not(:has(details.job))").forEach(mark);
    part.querySelectorAll("details.job").forEach(function (job) {  // notebooks, when they are opened
      job.addEventListener("toggle", function () { mark(job); }, { once: true });
    });
  }
